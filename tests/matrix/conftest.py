"""Records what worked, for the tables of what is supported."""

import json
from importlib.metadata import version
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--support-table", type=Path, metavar="FILE", help="write outcomes, for support_table.py to print"
    )


def pytest_configure(config):
    if file := config.getoption("--support-table", None):
        config.pluginmanager.register(SupportTable(file))


class SupportTable:
    def __init__(self, file):
        self.file = file
        self.outcomes = []

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        file, _, test = report.nodeid.partition("::")
        outcome = "refused" if dict(report.user_properties).get("refused") else report.outcome
        self.outcomes.append((file, test, outcome))

    def pytest_sessionfinish(self):
        versions = ", ".join(f"{package} {version(package)}" for package in ("peft", "transformers"))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"versions": versions, "outcomes": self.outcomes}, indent=1), encoding="utf-8")
