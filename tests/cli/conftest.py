"""The command line, run within the process of the tests, on models that take no time."""

import json
from dataclasses import dataclass

import pytest
import torch
from gptq_models import float_llama, save_tiny_llama, tiny_tokenizer

from peft_quant.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def table(self):
        """Rows of the table that was printed, by their first cell."""
        lines = [line.strip("| ").split(" | ") for line in self.stdout.splitlines() if line.startswith("|")]
        return {name: cells for name, *cells in lines[2:]}


@pytest.fixture
def run(capsys, monkeypatch):
    """`run("merge", base, adapter, out)`: its exit code and what it printed, unwrapped."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def rows():
    """64 texts of 16 words that count upwards: something a small model can learn."""
    starts = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(f"w{start + i}" for i in range(16)) for start in starts]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`base`, a GPTQ checkpoint, and `float`, of which it was made; both with a tokenizer. Not to be written to."""
    directory = tmp_path_factory.mktemp("models")
    save_tiny_llama(directory / "base")
    float_llama().half().save_pretrained(directory / "float")
    for name in ("base", "float"):
        tiny_tokenizer().save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="session")
def text(rows, tmp_path_factory):
    """A file of them."""
    file = tmp_path_factory.mktemp("text") / "counting.txt"
    file.write_text("\n\n".join(rows), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def data_sets(tmp_path_factory, monkeypatch):
    """Where datasets keeps what it read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "data_sets")
