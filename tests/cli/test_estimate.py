"""`peft-quant estimate`."""

import re

import pytest

from peft_quant import estimate_memory
from peft_quant.estimate import METHODS, Estimate


@pytest.fixture
def estimate(run, models):
    return lambda *options: run("estimate", models / "base", "--sequence", 16, *options)


def test_a_column_a_method(estimate, models):
    result = estimate()
    assert result.code == 0, result.stderr
    columns = result.stdout.strip().splitlines()[0].strip("| ").split(" | ")
    assert columns[0] == "GB, 1 x 16 tokens"
    assert [column.split(",")[0] for column in columns[1:]] == list(METHODS)
    assert columns[1:3] == ["peqa, 4 bits", "lrec, 4 bits"]
    for row in ("weights", "scales", "adapter", "gradients", "optimizer", "activations", "peak"):
        assert len(result.table[row]) == len(METHODS), row


def test_the_table_is_the_library_s(run, models, tmp_path):
    file = tmp_path / "config.json"
    text = (models / "base" / "config.json").read_text()
    file.write_text(re.sub(r'"(hidden_size|intermediate_size)": \d+', r'"\1": 4096', text))
    options = {"rank": 8, "batch": 3, "sequence": 512, "checkpointing": False, "optimizer": "adamw8bit"}
    given = ["--rank", 8, "--batch-size", 3, "--sequence-length", 512, "--no-checkpointing"]
    given += ["--optimizer", "adamw8bit", "--bits", 3, "--group-size", 64]
    result = run("estimate", file, "--method", "lrec", *given)
    report = estimate_memory(file, "lrec", bits=3, group_size=64, **options)
    assert result.code == 0, result.stderr
    assert result.table["peak"] == [f"{report.total / 1e9:.2f}"]
    for row in report.rows:
        assert result.table[row.what] == [f"{row.bytes / 1e9:.2f}"]


def test_the_largest_batch(estimate, models):
    counted = Estimate(models / "base", "peqa", sequence=16)
    memory = counted.peak(5)
    result = estimate("--method", "peqa", "--gpu-memory", f"{memory / 1e9:.9f} GB")
    assert result.table["largest batch"] == [str(counted.largest_batch(memory))]
    assert counted.largest_batch(memory) >= 5
    assert estimate("--method", "peqa", "--gpu-memory", "0.000001GB").table["largest batch"] == ["0"]


def test_the_old_name_of_the_memory(estimate):
    new, old = (estimate("--method", "peqa", option, "24GB") for option in ("--gpu-memory", "--card"))
    assert old.stdout == new.stdout
    assert "--card is now --gpu-memory" in old.stderr
    assert "--card" not in estimate("--help").stdout


@pytest.mark.parametrize(
    "options", (["--gpu-memory", "24"], ["--gpu-memory", "large"], ["--method", "dora"], ["--batch", "0"])
)
def test_wrong_usage(estimate, options):
    result = estimate(*options)
    assert (result.code, result.stdout) == (2, "")


def test_no_model(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    for model in (tmp_path, tmp_path / "nothing"):
        result = run("estimate", model)
        assert (result.code, result.stdout) == (1, "")
        assert "noth" in result.stderr or "nonsense" in result.stderr
