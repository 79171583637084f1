# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]"]
# ///
r"""Fine-tune the scales of a GPTQ model with PEQA and the stock Trainer, merge them, and serve the result.

Ends with a table of held-out perplexities, the last row of which is by a process that uses transformers alone. On
SmolLM2-135M-Instruct, on a CPU and without a model hub (`make demo`):

    python examples/demo_assets.py
    python examples/peqa_finetuning/peqa_finetuning.py --model .cache/assets/smollm2-135m-instruct-gptq-4bit \
        --float-model .cache/assets/smollm2-135m-instruct --data .cache/assets/king-james \
        --eval-data .cache/assets/king-james .cache/assets/wikipedia

With your own GPTQ checkpoint and text, each a path or a Hub id:

    python peqa_finetuning.py --model user/model-gptq-4bit --data user/data --eval-data user/data --steps 500
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator, set_seed

import peft_quant
from peft_quant.evaluation.loading import load_model
from peft_quant.evaluation.perplexity import perplexity
from peft_quant.evaluation.text import read_texts, token_windows


PLAIN_TRANSFORMERS = """
import math, sys, torch
from transformers import AutoModelForCausalLM

checkpoint, file = sys.argv[1:]
device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device)
texts = torch.load(file)
with torch.no_grad():
    losses = {
        name: [model(ids[None].to(device), labels=ids[None].to(device)).loss.item() for ids in windows]
        for name, windows in texts.items()
    }
    logits = model(next(iter(texts.values()))[:1, :64].to(device)).logits.float().cpu()
torch.save(({name: math.exp(sum(of_text) / len(of_text)) for name, of_text in losses.items()}, logits), file)
assert "peft_quant" not in sys.modules
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--float-model", help="the model that was quantized, to be compared with")
    parser.add_argument(
        "--data", required=True, help="text file, directory or Hub data set to tune on, its split train"
    )
    parser.add_argument(
        "--eval-data", nargs="+", required=True, help="texts to evaluate on, their split test; a file is taken whole"
    )
    parser.add_argument("--column", default="text", help="column of the texts in a data set")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".cache/peqa_finetuning"), help="new directory to write")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists: remove it, or name a new directory")
    adapter, merged = arguments.out / "adapter", arguments.out / "merged"

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def windows(source: str, split: str, size: int, number: int) -> Dataset:
        return token_windows(read_texts(source, arguments.column, split), tokenizer, size, number)

    held_out = {
        Path(source).stem: torch.tensor(windows(source, "test", 512, arguments.windows)["input_ids"][:])
        for source in arguments.eval_data
    }
    probe = next(iter(held_out.values()))[:1, :64]

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return {
            name: perplexity(model, tokens, description=f"perplexity, {name}") for name, tokens in held_out.items()
        }

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(probe.to(model.device)).logits.float().cpu()

    rows = {}
    if arguments.float_model is not None:
        rows["float"] = evaluate(load_model(arguments.float_model))
    model = load_model(arguments.model)
    rows["GPTQ"] = evaluate(model)

    set_seed(arguments.seed)
    model = get_peft_model(model, peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.out / "checkpoints"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, arguments.steps // 10),
            weight_decay=0.0,
            bf16=torch.cuda.is_available(),
            eval_strategy="steps",
            eval_steps=max(1, arguments.steps // 2),
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=windows(
            arguments.data, "train", arguments.sequence_length, arguments.steps * arguments.batch_size
        ),
        eval_dataset=windows(arguments.eval_data[0], "test", arguments.sequence_length, 8),
        data_collator=default_data_collator,
    ).train()
    model.save_pretrained(adapter)
    peft_quant.merge_checkpoint(arguments.model, adapter, merged)

    tuned = load_model(adapter)
    rows["GPTQ + PEQA adapter"] = evaluate(tuned)
    expected = logits(tuned)
    same_arithmetic = logits(get_peft_model(load_model(merged), peft_quant.PEQAConfig(task_type="CAUSAL_LM")))
    exchange = arguments.out / "windows.pt"
    torch.save(held_out, exchange)
    subprocess.run([sys.executable, "-c", PLAIN_TRANSFORMERS, str(merged), str(exchange)], check=True)
    rows["merged, plain transformers"], served = torch.load(exchange)

    print(f"\n| held-out perplexity | {' | '.join(held_out)} |\n|---{'|---' * len(held_out)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
    print(
        f"\nadapter: {(adapter / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB, {adapter}\n"
        f"max |logit difference|, adapter against merged: {(same_arithmetic - expected).abs().max():g} in the same "
        f"arithmetic, {(served - expected).abs().max():.3f} through the engine's own kernel "
        f"(largest logit {expected.abs().max():.1f})"
    )

    options = ("steps", "batch_size", "sequence_length", "learning_rate", "seed")
    rows = {name: {text: round(value, 2) for text, value in row.items()} for name, row in rows.items()}
    own = {adapter: rows.pop("GPTQ + PEQA adapter"), merged: rows.pop("merged, plain transformers")}
    for directory, values in own.items():
        peft_quant.write_model_card(
            directory,
            settings={"text": Path(arguments.data).stem, **{name: getattr(arguments, name) for name in options}},
            perplexity=values,
            compared_with=rows,
        )


if __name__ == "__main__":
    main()
