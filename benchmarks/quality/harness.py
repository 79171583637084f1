"""Shared by `lrec.py` and `qft.py`: texts and their perplexity, and cached stages."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from peft_quant.evaluation.perplexity import perplexity
from peft_quant.evaluation.text import token_windows


os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # otherwise the first packing compiles C++ for a minute
torch._dynamo.config.disable = True  # otherwise gptqmodel compiles every layer at its first forward

FLOAT_MODEL = "smollm2-135m-instruct"
GENERAL = "wikipedia"


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of both measurements."""
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--assets", type=Path, default=Path(".cache/assets"), help="what examples/demo_assets.py made")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache", name), help="for stages, each done once")
    parser.add_argument("--output", type=Path, help="JSON file of the options and the results")


def write_results(arguments: argparse.Namespace, **results: Any) -> None:
    """Write results for `benchmarks/quality.py` to `--output`, if given."""
    if arguments.output is not None:
        options = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
        packages = ("peft-quant", "peft", "transformers", "torch", "gptqmodel", "optimum")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
        versions = f"{device}; " + ", ".join(f"{package} {version(package)}" for package in packages)
        content = {"options": options, **results, "versions": versions}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def windows(tokenizer: Any, texts: Dataset, size: int, number: int | None = None) -> torch.Tensor:
    """The first token windows, int64 `[number, size]`; fewer if the texts are shorter."""
    return torch.tensor(token_windows(texts, tokenizer, size, number)["input_ids"][:])


def evaluate(model: Any, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity on each text, by name."""
    return {name: perplexity(model, tokens, description=f"perplexity, {name}") for name, tokens in held_out.items()}


def digest(**settings: Any) -> str:
    """A short name for the settings of a run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Stages:
    """Results of the stages, cached in a JSON file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def run(self, name: str, function: Callable[[], Any], artifact: Path | None = None) -> Any:
        """The JSON result of a stage: from the file if it is there and the artifact exists, otherwise computed."""
        if name not in self.results or (artifact is not None and not artifact.exists()):
            print(f"\n== {name}", flush=True)
            self.results[name] = function()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.results, indent=2))
            temporary.replace(self.file)
        return self.results[name]
