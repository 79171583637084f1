"""Prints the documentation's table of training steps, from `results/train_step.csv`: the fastest run of each cell.

python benchmarks/table.py [DIRECTORY]
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "--compile default": "compiled",
    "--compile reduce-overhead": "compiled, CUDA graphs",
    "--liger": "Liger loss",
    "--optimizer adamw8bit": "8-bit AdamW",
    "--optimizer torchao-adamw8bit": "torchao's 8-bit AdamW",
    "--optimizer lion8bit": "8-bit Lion",
    "--optimizer sgd": "SGD",
    "--in-backward": "in backward",
    "--recompute-pointwise": "recomputing",
    "--offload": "offloaded",
    "--correction": "KL loss",
    "--rank 32": "rank 32",
    "--max-fusion-buffers 5": "5 buffers",
}


class Row(NamedTuple):
    gpu: str
    method: str
    peer: str
    bits: str
    group: str
    layers: str
    tokens: str
    settings: str


class Cell(NamedTuple):
    milliseconds: float
    gigabytes: float | None

    def __str__(self) -> str:
        peak = "" if self.gigabytes is None else f" / {self.gigabytes:.1f}"
        return f"{self.milliseconds:.0f}{peak}"


def read(directory: Path) -> dict[Row, dict[str, Cell]]:
    """Read the cells of every row of the table, by checkpointing."""
    runs = defaultdict(list)
    with (directory / "train_step.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            settings = [label for option, label in SETTINGS.items() if option in line["command"]]
            row = Row(
                *(line[name] for name in Row._fields[:6]),
                tokens=f"{line['batch']} x {line['seq']}",
                settings=", ".join(settings) or "eager",
            )
            runs[row, line["checkpointing"]].append((line["step_ms"], line["peak_gb"]))
    rows: dict[Row, dict[str, Cell]] = defaultdict(dict)
    for (row, checkpointing), measured in runs.items():
        milliseconds, peak = min(measured, key=lambda run: float(run[0]))  # other load can only slow it down
        rows[row][checkpointing] = Cell(float(milliseconds), float(peak) if peak else None)
    return rows


def _place(item: tuple[Row, dict[str, Cell]]) -> tuple[object, ...]:
    """Sort key: the 7B shape first, adapters before full fine-tuning, ours before peers, the fastest first."""
    row, cells = item
    whole = row.method.startswith(("qft", "full"))
    fastest = min(cell.milliseconds for cell in cells.values())
    return row.layers != "32", whole, row.tokens, row.peer != "ours", row.method, fastest


def show(directory: Path) -> None:
    """Print one table per GPU."""
    rows = read(directory)
    for gpu in dict.fromkeys(row.gpu for row in rows):
        print(f"\n{gpu}: milliseconds a step / peak GB\n")
        names = [*Row._fields[1:], "no checkpointing", "checkpointing"]
        print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
        for row, cells in sorted(rows.items(), key=_place):
            if row.gpu == gpu:
                measured = [str(cells.get(checkpointing, "")) for checkpointing in ("0", "1")]
                print("| " + " | ".join([*row[1:], *measured]) + " |")


if __name__ == "__main__":
    show(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
