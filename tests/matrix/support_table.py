"""Prints the table of what is supported, from what `pytest tests/matrix --support-table FILE` counted.

python tests/matrix/support_table.py FILE [FILE ...]
"""

import json
import sys
from pathlib import Path


METHODS = ("PEQA", "LREC")


def cell(outcomes):
    """Rows of the matrix on which the operation works, and on how many others it is refused."""
    parts = [str(outcomes.get("passed", 0))]
    parts += [f"{outcomes[outcome]} {outcome}" for outcome in ("refused", "failed", "skipped") if outcome in outcomes]
    return ", ".join(parts[1:] if parts[0] == "0" else parts)


def main(files):
    runs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    counts = [{(operation, method): outcomes for operation, method, outcomes in run["counts"]} for run in runs]
    headings = [f"{method}, {run['versions']}" for method in METHODS for run in runs]
    print("| " + " | ".join(["operation", *headings]) + " |\n|" + "---|" * (len(headings) + 1))
    for operation in dict.fromkeys(operation for run in counts for operation, _ in run):
        cells = [cell(run.get((operation, method), {})) for method in METHODS for run in counts]
        print("| " + " | ".join([operation, *cells]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
