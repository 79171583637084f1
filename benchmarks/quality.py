"""Perplexities of `examples/lrec_correction`: from the results of its runs to `results/quality.csv`, and its table.

    python examples/lrec_correction/lrec_correction.py --bits 2 --asymmetric --output 2bit.json
    python benchmarks/quality.py 2bit.json   # appends, then prints
    python benchmarks/quality.py             # prints

A cell is the mean over seeds, with the largest deviation from it where there are several. Beside it is the part of the
gap between GPTQ and float that it closes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from record import append


RESULTS = Path(__file__).parent / "results"
EXAMPLE = "python examples/lrec_correction/lrec_correction.py"
CORPORA = {"general": "Wikipedia", "task": "King James"}
METHODS = {
    "float": ("float", ""),
    "gptq": ("gptq", ""),
    "eora": ("eora", "eora"),
    "svd": ("lrec", "svd"),
    "whitened": ("lrec", "whitened"),
    "ce": ("lora", "zero"),
    "rilq": ("rilq", "svd"),
    "lrec-zero": ("lrec", "zero"),
    "lrec-svd": ("lrec", "svd"),
    "lrec-whitened": ("lrec", "whitened"),
}
"""`method` and `init` of the CSV for each branch of the example; its rows on the task are no part of the table."""
UNTRAINED = ("float", "gptq", "eora", "svd", "whitened")


def record(file: Path, directory: Path) -> None:
    """Append the rows of a run of the example."""
    run = json.loads(file.read_text(encoding="utf-8"))
    options = run["options"]
    gpu, _, packages = run["versions"].partition("; ")
    for name, perplexities in run["rows"].items():
        if name not in METHODS:
            continue
        method, init = METHODS[name]
        trained = name not in UNTRAINED
        for corpus, perplexity in perplexities.items():
            append(
                "quality",
                directory,
                model="SmolLM2-135M-Instruct",
                method=method,
                init=init,
                bits=options["bits"] if method != "float" else "",
                group=options["group_size"] if method != "float" else "",
                rank=options["rank"] if init else "",
                seed=options["seed"] if trained else "",
                train_tokens=options["steps"] * options["batch_size"] * options["sequence_length"] if trained else 0,
                corpus=CORPORA[corpus],
                split="validation" if options["validation"] else "held-out",
                tokens=options["windows"] * 511,
                ppl=round(perplexity, 3),
                loss=round(math.log(perplexity), 4),
                versions=f"{packages}; {gpu}".replace(", ", "; "),
                command=_command(options, name),
            )


def _command(options: dict[str, Any], row: str) -> str:
    """The example's command for one row."""
    words = [EXAMPLE]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] * value
        elif not isinstance(value, list):
            words += [option, str(value)]
    return " ".join([*words, *(["--only", row] if row not in ("float", "gptq") else [])])


def show(directory: Path) -> None:
    """Print a table for each base, of held-out perplexities."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with (directory / "quality.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["split"] == "held-out":
                cells[_row(line)][line["corpus"]].append(float(line["ppl"]))
    floor = next(row for row in cells if row[0] == "float")
    for base in (row for row in cells if row[0] == "gptq"):
        print(f"\n{base[2]} bits, groups of {base[3]}\n\n| | " + " | | ".join(CORPORA.values()) + " | |")
        print("|---" * (1 + 2 * len(CORPORA)) + "|")
        for row in cells:
            if row == floor or row[2:4] == base[2:4]:
                texts = []
                for corpus in CORPORA.values():
                    ends = (statistics.fmean(cells[end][corpus]) for end in (base, floor))
                    texts += _cells(cells[row][corpus], *ends)
                print("| " + " | ".join([_title(row), *texts]) + " |")


def _row(line: dict[str, str]) -> tuple[str, ...]:
    words = line["command"].split()
    options = [f"{name} {words[words.index(name) + 1]}" for name in ("--ce-weight", "--top-k")]
    trained = line["train_tokens"] != "0"
    return (
        *(line[name] for name in ("method", "init", "bits", "group")),
        *(("trained", *options) if trained and line["method"] == "lrec" else ("trained",) * trained),
    )


def _title(row: tuple[str, ...]) -> str:
    method, init, _, _, *settings = row
    start = f", {init}" if init and init != method else ""
    if method == "lrec" and not settings:
        return f"start alone{start}"
    options = [option for option in settings[1:] if option not in ("--ce-weight 0.0", "--top-k 64")]
    return " ".join([f"{method}{start}", *(f"`{option}`" for option in options)])


def _cells(values: list[float], base: float, floor: float) -> tuple[str, str]:
    mean = statistics.fmean(values)
    spread = f" ± {max(abs(value - mean) for value in values):.2f}" if len(set(values)) > 1 else ""
    is_end, has_gap = mean in (base, floor), base > 1.01 * floor
    return f"{mean:.2f}{spread}", f"{(base - mean) / (base - floor):.0%}" if has_gap and not is_end else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="what the example wrote to its --output")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for file in arguments.files:
        record(file, arguments.out)
    show(arguments.out)


if __name__ == "__main__":
    main()
