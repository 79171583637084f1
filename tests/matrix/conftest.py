"""Counts what worked, for the table of what is supported."""

import json
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--support-table", type=Path, metavar="FILE", help="write counts, for support_table.py to print")


def pytest_configure(config):
    if file := config.getoption("--support-table", None):
        config.pluginmanager.register(SupportTable(file))


class SupportTable:
    def __init__(self, file):
        self.file = file
        self.counts = defaultdict(Counter)  # by (operation, method)

    def pytest_runtest_logreport(self, report):
        if "tests/matrix/test_matrix.py" not in report.nodeid or (report.passed and report.when != "call"):
            return
        test, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        method = parameters.partition(",")[0]
        outcome = "refused" if dict(report.user_properties).get("refused") else report.outcome
        self.counts[test.removeprefix("test_").replace("_", " "), method][outcome] += 1

    def pytest_sessionfinish(self):
        versions = ", ".join(f"{package} {version(package)}" for package in ("peft", "transformers"))
        counts = [[operation, method, outcomes] for (operation, method), outcomes in self.counts.items()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"versions": versions, "counts": counts}, indent=1), encoding="utf-8")
