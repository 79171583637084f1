# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]", "transformers[serving]"]
# ///
r"""Merge a PEQA adapter into its GPTQ checkpoint on files, check which bytes changed, and serve the result.

The merged checkpoint is loaded by a process that uses transformers alone, and asked over HTTP, served by
`transformers serve` on loopback. With an adapter of SmolLM2-135M-Instruct in 4 bits, after `make demo`:

    python examples/merge_and_serve/merge_and_serve.py --model .cache/assets/smollm2-135m-instruct-gptq-4bit \
        --adapter .cache/peqa_finetuning/adapter --eval-data .cache/assets/king-james

With your own, each a path or a Hub id:

    python merge_and_serve.py --model user/model-gptq-4bit --adapter user/adapter --eval-data user/data
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import numpy as np
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

import peft_quant
from peft_quant.evaluation.loading import load_model
from peft_quant.evaluation.perplexity import perplexity
from peft_quant.evaluation.text import read_texts, token_windows


HEALTHY_WITHIN = 120  # seconds
CARD = ("README.md", "peft_quant_facts.json")
PLAIN_TRANSFORMERS = """
import math, sys, torch
from transformers import AutoModelForCausalLM

checkpoint, file = sys.argv[1:]
device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device)
windows = torch.load(file).to(device)
with torch.no_grad():
    losses = [model(ids[None], labels=ids[None]).loss.item() for ids in windows]
    logits = model(windows[:1, :64]).logits.float().cpu()
torch.save((math.exp(sum(losses) / len(losses)), logits), file)
assert "peft_quant" not in sys.modules
"""


def compare_files(base: Path, merged: Path) -> dict[str, dict[str, int]]:
    """How many bytes of two checkpoints differ: in scales, in the model card, and in all else.

    Raises:
        RuntimeError: anything else differs.
    """
    kinds = {kind: {"parts": 0, "bytes": 0, "differ": 0} for kind in ("scales", "model card", "all else")}
    files = {file.relative_to(directory) for directory in (base, merged) for file in directory.rglob("*")}
    for file in sorted(file for file in files if not (base / file).is_dir()):
        for part, old, new in parts_of(base / file, merged / file):
            kind = "scales" if part.endswith(".scales") else "model card" if part in CARD else "all else"
            differing = max(old.size, new.size) if old.size != new.size else int(np.count_nonzero(old != new))
            if kind == "all else" and differing:
                raise RuntimeError(f"{part} differs in {differing} bytes, and only scales may: please report this.")
            kinds[kind]["parts"] += 1
            kinds[kind]["bytes"] += new.size
            kinds[kind]["differ"] += differing
    return kinds


def parts_of(old: Path, new: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The bytes of a file before and after, empty where it is missing: by tensor, if it has any, or as a whole."""
    before, after = (np.fromfile(file, np.uint8) if file.is_file() else np.empty(0, np.uint8) for file in (old, new))
    if old.suffix != ".safetensors" or before.size != after.size:
        yield old.name, before, after
        return
    # length of the header, header, data
    start = 8 + int.from_bytes(before[:8].tobytes(), "little")
    yield f"header of {old.name}", before[:start], after[:start]
    for tensor, entry in json.loads(before[8:start].tobytes()).items():
        if tensor != "__metadata__":
            span = slice(*(start + offset for offset in entry["data_offsets"]))
            yield tensor, before[span], after[span]


@contextmanager
def transformers_serve(checkpoint: Path, log: Path) -> Iterator[str]:
    """Serve a checkpoint on loopback by `transformers serve`; gives the URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if not torch.cuda.is_available():
        command += ["--device", "cpu", "--dtype", "float32"]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + HEALTHY_WITHIN
    while time.monotonic() < end and server.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except URLError:
            time.sleep(0.5)
    raise RuntimeError(f"transformers serve did not answer within {HEALTHY_WITHIN} s:\n{log.read_text()}")


def chat(url: str, checkpoint: Path, question: str) -> str:
    """The answer to one question, by the protocol that OpenAI's clients speak."""
    body = {"model": str(checkpoint), "messages": [{"role": "user", "content": question}], "max_tokens": 32}
    request = Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--adapter", required=True, help="PEQA adapter of it: path or Hub id")
    parser.add_argument(
        "--eval-data", required=True, help="text to evaluate on: text file, directory or Hub data set, its split test"
    )
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens to evaluate on")
    parser.add_argument("--question", default="What is a lighthouse?", help="to ask the server")
    parser.add_argument("--out", type=Path, default=Path(".cache/merge_and_serve"), help="new directory to write")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists: remove it, or name a new directory")

    base, adapter = directory_of(arguments.model), directory_of(arguments.adapter)
    merged = peft_quant.merge_checkpoint(base, adapter, arguments.out / "merged")
    files = compare_files(base, merged)

    texts = read_texts(arguments.eval_data, split="test")
    windows = token_windows(texts, AutoTokenizer.from_pretrained(base), 512, arguments.windows)
    held_out = torch.tensor(windows["input_ids"][:])

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(held_out[:1, :64].to(model.device)).logits.float().cpu()

    with_adapter = PeftModel.from_pretrained(load_model(base), adapter)
    expected = logits(with_adapter)
    rows = {"GPTQ + PEQA adapter": perplexity(with_adapter, held_out)}
    same_arithmetic = logits(get_peft_model(load_model(merged), peft_quant.PEQAConfig(task_type="CAUSAL_LM")))
    exchange = arguments.out / "windows.pt"
    torch.save(held_out, exchange)
    subprocess.run([sys.executable, "-c", PLAIN_TRANSFORMERS, str(merged), str(exchange)], check=True)
    rows["merged, plain transformers"], served = torch.load(exchange)

    print("\n| | parts | bytes | that differ |\n|---|---|---|---|")
    for kind, count in files.items():
        print(f"| {kind} | {count['parts']} | {count['bytes']:,} | {count['differ']:,} |")
    print("\n| | held-out perplexity |\n|---|---|")
    for title, value in rows.items():
        print(f"| {title} | {value:.2f} |")
    print(
        f"\nmax |logit difference|, adapter against merged: {(same_arithmetic - expected).abs().max():g} in the same "
        f"arithmetic, {(served - expected).abs().max():.3f} through the engine's own kernel "
        f"(largest logit {expected.abs().max():.1f})"
    )
    if is_serve_available():
        with transformers_serve(merged, arguments.out / "server.log") as url:
            print(f"\n{arguments.question}\n> {chat(url, merged, arguments.question)}")
    else:
        print("\nnot asked over HTTP, which needs: pip install 'transformers[serving]'")
    print(f"\nmerged checkpoint: {merged}")


def directory_of(checkpoint: str) -> Path:
    """The directory of a path or Hub id."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(snapshot_download(checkpoint))


if __name__ == "__main__":
    main()
