"""Quality of LREC and QFT: records the results of `quality/lrec.py` and `quality/qft.py`, and prints the tables.

    python benchmarks/quality/lrec.py --bits 2 --asymmetric --output 2bit.json
    python benchmarks/quality/qft.py --output qft.json
    python benchmarks/quality.py 2bit.json qft.json   # appends, then prints
    python benchmarks/quality.py                      # prints

A cell is the mean over seeds, with the largest deviation from the mean if there are several seeds. Next to it is, for
LREC, the part of the gap between GPTQ and float that it closes; for QFT, its difference from Lion in fp32.
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
MODEL = "SmolLM2-135M-Instruct"
LREC_COMMAND = "python benchmarks/quality/lrec.py"
QFT_COMMAND = "python benchmarks/quality/qft.py"
FULL_REFERENCE = "fp32 Lion"
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
"""`method` and `init` of the CSV for each row of `quality/lrec.py`; rows on the task are not in the table."""
UNTRAINED = ("float", "gptq", "eora", "svd", "whitened")


def record(file: Path, directory: Path) -> None:
    """Append the rows of a run to the table."""
    run = json.loads(file.read_text(encoding="utf-8"))
    gpu, _, packages = run["versions"].partition("; ")
    where = f"{packages}; {gpu}".replace(", ", "; ")
    if "text" in run:
        _record_full(run, where, directory)
    else:
        _record_lrec(run, where, directory)


def _record_lrec(run: dict[str, Any], where: str, directory: Path) -> None:
    options = run["options"]
    for name, perplexities in run["rows"].items():
        if name not in METHODS:
            continue
        method, init = METHODS[name]
        trained = name not in UNTRAINED
        for corpus, perplexity in perplexities.items():
            append(
                "quality",
                directory,
                model=MODEL,
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
                versions=where,
                command=_command(options, name),
            )


def _record_full(run: dict[str, Any], where: str, directory: Path) -> None:
    """Append rows of full fine-tuning: `method` is the name of a row, `bits` the bits of its weights."""
    options = run["options"]
    names = ("text", "steps", "batch_size", "sequence_length", "windows", "dtype")
    words = [QFT_COMMAND, *(f"--{name.replace('_', '-')} {options[name]}" for name in names)]
    for name, results in run["rows"].items():
        for result in results:
            for corpus, loss in result["after"].items():
                append(
                    "quality",
                    directory,
                    model=MODEL,
                    method=name,
                    bits=8 if name.startswith("QFT") else 32,
                    seed=result["seed"],
                    train_tokens=options["steps"] * options["batch_size"] * options["sequence_length"],
                    corpus=corpus,
                    split="held-out",
                    tokens=options["windows"] * 511,
                    ppl=round(math.exp(loss), 3),
                    loss=round(loss, 4),
                    versions=where,
                    command=" ".join([*words, f"--seeds {result['seed']} --only '{name}'"]),
                )


def _command(options: dict[str, Any], row: str) -> str:
    """The command that measures one row."""
    words = [LREC_COMMAND]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] * value
        elif not isinstance(value, list):
            words += [option, str(value)]
    return " ".join([*words, *(["--only", row] if row not in ("float", "gptq") else [])])


Cells = dict[tuple[str, ...], dict[str, list[float]]]
"""Perplexity of each seed, by corpus and by row (method, init, bits, group, training tokens, options if LREC)."""


def show(directory: Path) -> None:
    """Print the tables of held-out text."""
    of_lrec, of_full = read(directory)
    if of_lrec:
        show_lrec(of_lrec)
    if of_full:
        show_full(of_full)


def read(directory: Path) -> tuple[Cells, list[dict[str, str]]]:
    """Read the rows on held-out text: LREC's perplexities, and the lines of full fine-tuning."""
    with (directory / "quality.csv").open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["split"] == "held-out"]
    cells: Cells = defaultdict(lambda: defaultdict(list))
    of_lrec = [line for line in lines if line["command"].startswith(LREC_COMMAND)]
    for line in of_lrec:
        cells[_row(line)][line["corpus"]].append(float(line["ppl"]))
    return cells, [line for line in lines if line not in of_lrec]


def show_lrec(cells: Cells) -> None:
    """Print perplexities, one table per base."""
    floor = next(row for row in cells if row[0] == "float")
    for base in (row for row in cells if row[0] == "gptq"):
        print(f"\n{base[2]} bits, groups of {base[3]}\n\n| | " + " | | ".join(CORPORA.values()) + " | |")
        print("|---" * (1 + 2 * len(CORPORA)) + "|")
        for row in sorted(cells, key=_place):
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
        *(line[name] for name in ("method", "init", "bits", "group", "train_tokens")),
        *(options if trained and line["method"] == "lrec" else ()),
    )


def _place(row: tuple[str, ...]) -> tuple[bool, int]:
    """Sort key: untrained models first, then the order of `METHODS`."""
    return row[4] != "0", list(METHODS.values()).index(row[:2])


def _title(row: tuple[str, ...]) -> str:
    method, init, _, _, tokens, *options = row
    start = f", {init}" if init and init != method else ""
    if method == "lrec" and tokens == "0":
        return f"start alone{start}"
    options = [option for option in options if option not in ("--ce-weight 0.0", "--top-k 64")]
    return " ".join([f"{method}{start}", *(f"`{option}`" for option in options)])


def _cells(values: list[float], base: float, floor: float) -> tuple[str, str]:
    mean = statistics.fmean(values)
    is_end, has_gap = mean in (base, floor), base > 1.01 * floor
    return _mean(values, 2), f"{(base - mean) / (base - floor):.0%}" if has_gap and not is_end else ""


def show_full(lines: list[dict[str, str]]) -> None:
    """Print losses of full fine-tuning in nats per token, one column per training text."""
    losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["corpus"] != "Wikipedia":
            losses[line["method"]][line["corpus"]].append(float(line["loss"]))
    corpora = list(dict.fromkeys(corpus for of_method in losses.values() for corpus in of_method))
    print(f"\nFull fine-tuning\n\n| | {' | | seeds | '.join(corpora)} | | seeds |")
    print("|---" * (1 + 3 * len(corpora)) + "|")
    for method, of_method in sorted(losses.items(), key=lambda item: not item[0].startswith("QFT")):
        texts = []
        for corpus in corpora:
            values, reference = of_method[corpus], losses[FULL_REFERENCE][corpus]
            difference = statistics.fmean(values) / statistics.fmean(reference) - 1 if values and reference else 0
            texts += [_mean(values, 4), f"{difference:+.2%}" if difference else "", str(len(values) or "")]
        print("| " + " | ".join([method, *texts]) + " |")


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    spread = f" ± {max(abs(value - mean) for value in values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="what quality/lrec.py or qft.py wrote to --output")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for file in arguments.files:
        record(file, arguments.out)
    show(arguments.out)


if __name__ == "__main__":
    main()
