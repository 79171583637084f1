"""Perplexity and a few logits of a checkpoint, with transformers alone.

    python measure.py CHECKPOINT out.json --tokenizer DIR --text in=FILE --text out=FILE

Knows nothing of peft_quant: a merged model must need nothing but what serves any GPTQ checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


def windows(tokenizer: PreTrainedTokenizerBase, text: str, size: int, number: int | None = None) -> torch.Tensor:
    """`number` windows of `size` tokens, int64 `[number, size]`, without overlap, spread evenly over the text.

    Without a number, all that it has.
    """
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    available = tokens[: len(tokens) // size * size].view(-1, size)
    if number is None:
        return available
    if len(available) < number:
        raise ValueError(f"The text has {len(available)} windows of {size} tokens, {number} are needed.")
    return available[[i * len(available) // number for i in range(number)]]


@torch.no_grad()
def perplexity(model: PreTrainedModel, batch: torch.Tensor, description: str = "perplexity") -> float:
    """Perplexity a token of windows `[number, size]`; the first token of a window is context only."""
    model.eval()
    total = 0.0
    for part in tqdm(batch.split(4), desc=description, unit="batch", leave=False):
        tokens = part.to(model.device)
        logits = model(tokens).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / batch[:, 1:].numel())


@torch.no_grad()
def probe_logits(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Logits of the first 64 tokens of a text, to compare two models by."""
    return model.eval()(batch[:1, :64].to(model.device)).logits.float().cpu()


def evaluate(model: PreTrainedModel, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity on each text, by name."""
    return {name: perplexity(model, batch, f"perplexity, {name}") for name, batch in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path, help="JSON file of perplexities; the logits go beside it as .pt")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype, device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    texts = {
        name: windows(tokenizer, Path(file).read_text(encoding="utf-8"), arguments.window, arguments.windows)
        for name, file in (text.split("=", 1) for text in arguments.text)
    }
    probe = probe_logits(model, next(iter(texts.values())))
    torch.save(probe, arguments.output.with_suffix(".pt"))
    arguments.output.write_text(json.dumps(evaluate(model, texts)), encoding="utf-8")
    if "peft_quant" in sys.modules:
        raise RuntimeError("peft_quant was imported, so this is no proof that the checkpoint does without it")


if __name__ == "__main__":
    main()
