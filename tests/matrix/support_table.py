"""Prints the tables of what is supported, from what `pytest --support-table FILE` recorded.

python tests/matrix/support_table.py FILE [FILE ...]
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path


METHODS = ("PEQA", "LREC")
COLUMNS = {
    "loaded whole": ["test_loaded_whole"],
    "PEQA trains": ["test_peqa_trains"],
    "LREC trains": ["test_lrec_trains"],
    "QFT trains, int8 read back": ["test_held_in_int8", "test_qft_trains"],
    "adapter saved and loaded": ["test_adapter_saved_and_loaded"],
    "merged on files as in memory": ["test_merged_on_files_as_in_memory", "test_declared_options_survive_a_merge"],
    "`inspect` is right": ["test_inspected"],
}


def split(test):
    """Name of a test and its parameters."""
    name, _, parameters = test.rpartition("::")[2].partition("[")
    return name, parameters.removesuffix("]")


def cell(outcomes):
    """Rows of the matrix on which the operation works, and on how many others it is refused."""
    parts = [str(outcomes.get("passed", 0))]
    parts += [f"{outcomes[outcome]} {outcome}" for outcome in ("refused", "failed", "skipped") if outcome in outcomes]
    return ", ".join(parts[1:] if parts[0] == "0" else parts)


def operations(runs):
    """Operations by methods, in numbers of rows of the matrix; versions side by side."""
    counts = [defaultdict(Counter) for _ in runs]
    for run, count in zip(runs, counts):
        for file, test, outcome in run["outcomes"]:
            name, parameters = split(test)
            if file == "tests/matrix/test_matrix.py":
                count[name.removeprefix("test_").replace("_", " "), parameters.partition(",")[0]][outcome] += 1
    yield ["operation", *(f"{method}, {run['versions']}" for method in METHODS for run in runs)]
    for operation in dict.fromkeys(operation for count in counts for operation, _ in count):
        yield [operation, *(cell(count[operation, method]) for method in METHODS for count in counts)]


def families(run):
    """Families of checkpoints by what users do with them, in one run."""
    found = defaultdict(dict)
    for file, test, outcome in run["outcomes"]:
        name, family = split(test)
        if file == "tests/families/test_families.py":
            found[family][name] = outcome
    yield [f"checkpoint ({run['versions']})", *COLUMNS]
    for family, outcomes in sorted(found.items()):
        cells = []
        for tests in COLUMNS.values():
            seen = {outcomes.get(test, "not run") for test in tests} - {"skipped"}
            cells.append("yes" if seen == {"passed"} else ", ".join(sorted(seen)))
        yield [family, *cells]


def main(files):
    runs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    for table in (operations(runs), families(runs[-1])):
        for number, row in enumerate(table):
            print("| " + " | ".join(row) + " |")
            if number == 0:
                print("|" + "---|" * len(row))
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
