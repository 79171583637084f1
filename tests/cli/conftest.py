"""The command line, run within the process of the tests."""

import json
from dataclasses import dataclass

import pytest

from peft_quant.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout)


@pytest.fixture
def run(capsys, monkeypatch):
    """`run("merge", base, adapter, out)`: its exit code and what it printed, unwrapped."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return run
