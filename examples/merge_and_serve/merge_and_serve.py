# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]", "transformers[serving]"]
# ///
"""Merge a PEQA adapter into its GPTQ checkpoint on files, check which bytes changed, and serve the result.

Without arguments, on a CPU and without a model hub: an adapter of SmolLM2-135M-Instruct in 4 bits is tuned on the King
James Bible for a minute, merged, loaded by a process that uses transformers alone, and asked over HTTP, served by
`transformers serve` on loopback.

    python merge_and_serve.py

With your own, each a path or a Hub id:

    python merge_and_serve.py --model user/model-gptq-4bit --adapter user/adapter

Every stage is kept under --work-dir and not done twice. --smoke runs all of it in seconds, on a tiny random model.
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
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, digest, parse, versions  # noqa: I001

import demo_assets
import numpy as np
import smoke_model
import torch
from huggingface_hub import snapshot_download
from measure import evaluate, probe_logits, windows
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available
from tuning import Settings, tune

import peft_quant
from peft_quant.evaluation.loading import load_model


HEALTHY_WITHIN = 120  # seconds
CARD = ("README.md", "peft_quant_facts.json")


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


def evaluate_in_fresh_process(merged: Path, work: Path, text: str, number: int) -> dict[str, float]:
    """Perplexity, and beside it logits, by a process that imports transformers and never peft_quant."""
    held_out = work / "held-out.txt"
    held_out.write_text(text, encoding="utf-8")
    output = merged.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "measure.py"), str(merged), str(output)]
    subprocess.run([*command, "--windows", str(number), "--text", f"tuned={held_out}"], check=True)
    return json.loads(output.read_text())


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
    parser.add_argument("--model", help="GPTQ checkpoint: path or Hub id; by default SmolLM2 in 4 bits")
    parser.add_argument("--adapter", help="PEQA adapter of it: path or Hub id; by default one is tuned")
    parser.add_argument("--steps", type=int, default=10, help="to tune it")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens to evaluate on")
    parser.add_argument("--question", default="What is a lighthouse?", help="to ask the server")
    arguments = parse(parser, "merge_and_serve", steps=2, windows=2)
    if (arguments.model is None) != (arguments.adapter is None):
        parser.error("--model and --adapter go together: an adapter fits no other base")

    assets: Any = smoke_model if arguments.smoke else demo_assets
    work = arguments.work_dir
    train_text, held_out_text = assets.king_james()
    base = directory_of(arguments.model) if arguments.model else assets.gptq_model()
    settings = Settings(str(base), train_text, arguments.steps, batch_size=2, sequence_length=256, learning_rate=1e-3)
    adapter = directory_of(arguments.adapter) if arguments.adapter else work / settings.name
    name = digest(base=str(base), adapter=str(adapter))
    merged = work / f"merged-{name}"
    asked = digest(windows=arguments.windows, question=arguments.question)
    stages = Stages(work / f"results-{name}-{asked}.json")
    if not adapter.exists():
        stages.run("tune", lambda: tune(settings, adapter), adapter)
    if not merged.exists():
        stages.run("merge", lambda: str(peft_quant.merge_checkpoint(base, adapter, merged)), merged)
    files = stages.run("compare the files", lambda: compare_files(base, merged))

    held_out = windows(AutoTokenizer.from_pretrained(base), held_out_text, 512, arguments.windows)
    logits = {"adapter": merged.with_suffix(".adapter.pt"), "served": merged.with_suffix(".pt")}

    def evaluate_adapter() -> dict[str, float]:
        model = PeftModel.from_pretrained(load_model(base), adapter)
        torch.save(probe_logits(model, held_out), logits["adapter"])
        return evaluate(model, {"tuned": held_out})

    def same_arithmetic() -> float:
        model = get_peft_model(load_model(merged), peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
        return (probe_logits(model, held_out) - torch.load(logits["adapter"])).abs().max().item()

    def ask() -> str:
        with transformers_serve(merged, work / "server.log") as url:
            return chat(url, merged, arguments.question)

    rows = {
        "GPTQ + PEQA adapter": stages.run("evaluate the adapter", evaluate_adapter, logits["adapter"]),
        "merged, plain transformers": stages.run(
            "evaluate by transformers alone",
            lambda: evaluate_in_fresh_process(merged, work, held_out_text, arguments.windows),
            logits["served"],
        ),
    }
    difference = stages.run("compare the logits", same_arithmetic)
    answer = stages.run("ask transformers serve", ask) if is_serve_available() else None

    print("\n| | parts | bytes | that differ |\n|---|---|---|---|")
    for kind, count in files.items():
        print(f"| {kind} | {count['parts']} | {count['bytes']:,} | {count['differ']:,} |")
    print("\n| | held-out perplexity |\n|---|---|")
    for title, row in rows.items():
        print(f"| {title} | {row['tuned']:.2f} |")
    expected, served = (torch.load(file) for file in logits.values())
    print(
        f"\nmax |logit difference|, adapter against merged: {difference:g} in the same arithmetic, "
        f"{(served - expected).abs().max():.3f} through the engine's own kernel "
        f"(largest logit {expected.abs().max():.1f})"
    )
    if answer is None:
        print("\nnot asked over HTTP, which needs: pip install 'transformers[serving]'")
    else:
        print(f"\n{arguments.question}\n> {answer}")
    print(f"\nmerged checkpoint: {merged}")
    print("\n| stage | seconds |\n|---|---|")
    for title, stage in stages.results.items():
        print(f"| {title} | {stage['seconds']} |")
    print(f"\n{versions()}")


def directory_of(checkpoint: str) -> Path:
    """The directory of a path or Hub id."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(snapshot_download(checkpoint))


if __name__ == "__main__":
    main()
