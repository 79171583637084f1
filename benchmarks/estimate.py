"""Compares `peft-quant estimate` with measured peaks: the documentation's table, from `results/train_step.csv`.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --shape 1b

Covers all cells that train as the estimate assumes: without compilation, with PyTorch's loss, saved activations on the
GPU. A cell with several runs counts with their median. Nothing runs on a GPU. GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from random_llama import SHAPES, VOCABULARY
from transformers import LlamaConfig

from peft_quant import estimate_memory


RESULTS = Path(__file__).parent / "results"
METHODS = {
    ("ours", "peqa"): "peqa",
    ("ours", "lrec"): "lrec",
    ("ours", "qft-stack"): "qft-stack",
    ("ours", "qft-fused"): "qft-fused",
    ("peft", "lora"): "lora",
    ("peft", "lora-bf16"): "lora",
    ("bitsandbytes", "lora"): "qlora",
}
OTHER_STEPS = re.compile("--(compile|liger|offload|correction|in-backward|recompute-pointwise)|lion8bit|sgd")


class Cell(NamedTuple):
    gpu: str
    shape: str
    method: str
    bits: int
    group_size: int
    rank: int
    batch: int
    sequence: int
    checkpointing: bool
    optimizer: str

    def estimate(self) -> float:
        """Estimated peak in GB."""
        options = self._asdict()
        shape = SHAPES[options.pop("shape")]
        del options["gpu"]
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **shape)
        with redirect_stdout(sys.stderr):  # banners of packages
            return estimate_memory(config, **options).total / 1e9


def measured(directory: Path) -> dict[Cell, float]:
    """Measured peak in GB of every cell that ran on a GPU."""
    runs = defaultdict(list)
    with (directory / "train_step.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            method = METHODS.get((line["peer"], line["method"]))
            if method is None or not line["peak_gb"] or OTHER_STEPS.search(line["command"]):
                continue
            rank = re.search(r"--rank (\d+)", line["command"])
            shape = re.search(r"--shape (\w+)", line["command"])
            cell = Cell(
                gpu=line["gpu"],
                shape=shape[1] if shape else "7b",
                method=method,
                bits=int(line["bits"]) if method in ("peqa", "lrec") else 4,
                group_size=int(line["group"] or -1) if method in ("peqa", "lrec") else 128,
                rank=int(rank[1]) if rank else 16,
                batch=int(line["batch"]),
                sequence=int(line["seq"]),
                checkpointing=line["checkpointing"] == "1",
                optimizer="adamw8bit" if "--optimizer adamw8bit" in line["command"] else "adamw",
            )
            runs[cell].append(float(line["peak_gb"]))
    return {cell: statistics.median(peaks) for cell, peaks in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    print("| GPU | model | method | tokens | checkpointing | measured GB | estimated GB | difference |")
    print("|---|---|---|---|---|---:|---:|---:|")
    cells = {cell: peak for cell, peak in measured(arguments.results).items() if cell.shape in arguments.shape}
    order = list(METHODS.values())
    for cell in sorted(cells, key=lambda c: (c.gpu, list(SHAPES).index(c.shape), order.index(c.method), c[3:])):
        estimate, peak = cell.estimate(), cells[cell]
        method = cell.method if cell.optimizer == "adamw" else f"{cell.method}, 8-bit AdamW"
        names = [cell.gpu, cell.shape.upper(), method, f"{cell.batch} x {cell.sequence}"]
        names += [
            "yes" if cell.checkpointing else "no",
            f"{peak:.2f}",
            f"{estimate:.2f}",
            f"{estimate / peak - 1:+.1%}",
        ]
        print("| " + " | ".join(names) + " |", flush=True)


if __name__ == "__main__":
    main()
