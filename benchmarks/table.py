"""The README's table of training steps, from `results/train_step.csv`: median of what was measured for each cell.

python benchmarks/table.py
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path


def main() -> None:
    cells = defaultdict(list)
    with (Path(__file__).parent / "results" / "train_step.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            compiled = "compiled" if "--compile" in row["command"] else "eager"
            setting = (row["method"], row["bits"], row["group"], row["layers"], row["seq"], compiled)
            cells[(*setting, row["checkpointing"])].append((float(row["step_ms"]), float(row["peak_gb"])))
    print("| method | bits | group | layers | tokens | | no checkpointing, ms / GB | checkpointing, ms / GB |")
    print("|---|---|---|---|---|---|---|---|")
    for setting in dict.fromkeys(cell[:-1] for cell in cells):
        columns = []
        for checkpointing in ("0", "1"):
            runs = cells.get((*setting, checkpointing))
            if runs:
                milliseconds, gigabytes = (statistics.median(values) for values in zip(*runs))
                columns.append(f"{milliseconds:.0f} / {gigabytes:.1f}")
            else:
                columns.append("")
        print("| " + " | ".join([*setting, *columns]) + " |")


if __name__ == "__main__":
    main()
