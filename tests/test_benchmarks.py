"""The benchmarks run, at a tiny shape, and record what the documentation's table is printed from."""

import csv
import json
import math
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tiny_assets import write_tiny_assets


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OPTIONS = ("--shape", "tiny", "--seq", "16", "--steps", "1", "--repeat", "2", "--checkpointing", "1")


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_nothing_is_imported_before_a_peer_patches_it():
    seen = "import sys, train_step; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", seen], cwd=BENCHMARKS, text=True) == "set()\n"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    output = run(
        "train_step.py", *OPTIONS, "--method", "peqa", "lora", "--peer", "ours", "peft", "--out", str(directory)
    )
    assert "peft: has no peqa, skipped" in output
    return directory


def test_rows(results):
    with (results / "train_step.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [(row["peer"], row["method"], row["bits"], row["group"]) for row in rows]
    assert measured == [("ours", "peqa", "4", "128"), ("ours", "lora", "4", "128"), ("peft", "lora", "16", "")]
    for row in rows:
        assert (row["layers"], row["batch"], row["seq"], row["checkpointing"]) == ("2", "1", "16", "1")
        parts = [float(row[name]) for name in ("fwd_ms", "bwd_ms", "opt_ms")]
        assert 0 < parts[0] + parts[1] < 2 * float(row["step_ms"])
        assert "peft " in row["versions"]
        # the command measures this row and no other
        assert f"--method {row['method']} --shape tiny" in row["command"]
        assert ("--peer" in row["command"]) == (row["peer"] != "ours")
        assert "--out" not in row["command"]
    # dense weights against packed ones: embeddings and head are the same
    assert float(rows[0]["model_gb"]) < float(rows[2]["model_gb"])


def test_table(results):
    lines = run("table.py", str(results)).splitlines()
    assert [line.split(" | ")[:8] for line in lines if line.startswith("| peqa")] == [
        ["| peqa", "ours", "4", "128", "2", "1 x 16", "eager", ""]
    ]
    assert sum(line.startswith("| lora") for line in lines) == 2


def test_estimates_are_near_what_was_measured():
    rows = [line.strip("| ").split(" | ") for line in run("estimate.py").splitlines()[2:]]
    assert {row[1] for row in rows} == {"1B", "7B", "13B"}
    assert {row[2] for row in rows} >= {"peqa", "lrec", "qft-stack", "qft-fused", "lora", "qlora"}
    assert all(abs(float(row[-1].rstrip("%"))) < 10 for row in rows), rows


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return write_tiny_assets(tmp_path_factory.mktemp("assets"))


def run_quality(name, assets, directory, *options):
    """Run a measurement of quality and record it; gives what it printed and the rows of the CSV."""
    output = directory / f"{name}.json"
    paths = ("--assets", str(assets), "--work-dir", str(directory / "work"), "--output", str(output))
    printed = run(f"quality/{name}.py", *paths, "--steps", "2", "--sequence-length", "64", "--windows", "2", *options)
    run("quality.py", str(output), "--out", str(directory))
    with (directory / "quality.csv").open() as table:
        return printed, list(csv.DictReader(table))


def test_quality_of_lrec_is_measured(assets, tmp_path):
    options = ("--group-size", "32", "--calibration", "4", "--rank", "4")
    rows = ("eora", "whitened", "lrec-whitened", "task-second")
    printed, recorded = run_quality("lrec", assets, tmp_path, *options, "--only", *rows)
    assert "| task: a second adapter over it |" in printed
    assert [row["method"] for row in recorded[::2]] == ["float", "gptq", "eora", "lrec", "lrec"]
    assert all(float(row["ppl"]) > 1 for row in recorded)


def test_quality_of_qft_is_measured(assets, tmp_path):
    printed, recorded = run_quality("qft", assets, tmp_path)
    assert "| fp32 Lion, after |" in printed
    assert [(row["method"], row["corpus"]) for row in recorded[::2]] == [
        ("QFT", "King James"),
        ("fp32 Lion", "King James"),
    ]


def test_quality(tmp_path):
    options = {"bits": 3, "group_size": 64, "asymmetric": False, "rank": 8, "steps": 10, "batch_size": 2}
    options |= {
        "sequence_length": 32,
        "ce_weight": 0.5,
        "top_k": 64,
        "windows": 4,
        "validation": False,
        "only": ["ce"],
    }
    ends = {"float": {"general": 20.0, "task": 30.0}, "gptq": {"general": 40.0, "task": 30.1}}
    for seed, perplexity in enumerate((25.0, 24.0)):
        rows = {"lrec-svd": {"general": perplexity, "task": 30.0}, "task-zero": {"general": 1.0, "task": 1.0}}
        run_of_example = {"options": {**options, "seed": seed}, "rows": {**(ends if seed == 0 else {}), **rows}}
        file = tmp_path / f"{seed}.json"
        file.write_text(json.dumps({**run_of_example, "versions": "GPU; peft 0, torch 0"}))
    files = [str(tmp_path / f"{seed}.json") for seed in (0, 1)]
    lines = run("quality.py", *files, "--out", str(tmp_path / "out")).splitlines()
    assert [line for line in lines if line.startswith("| lrec")] == [
        # 15.5 of a gap of 20; there is no gap to speak of on the task
        "| lrec, svd `--ce-weight 0.5` | 24.50 ± 0.50 | 78% | 30.00 |  |"
    ]
    with (tmp_path / "out" / "quality.csv").open() as table:
        recorded = list(csv.DictReader(table))
    assert [(row["method"], row["init"], row["bits"], row["seed"], row["train_tokens"]) for row in recorded[::2]] == [
        ("float", "", "", "", "0"),
        ("gptq", "", "3", "", "0"),
        ("lrec", "svd", "3", "0", "640"),
        ("lrec", "svd", "3", "1", "640"),
    ]
    assert recorded[4]["command"].endswith("--only lrec-svd")
    assert "--asymmetric" not in recorded[4]["command"]


def test_quality_of_full_fine_tuning(tmp_path):
    options = {"text": "king-james", "steps": 10, "batch_size": 2, "sequence_length": 32, "windows": 4}
    losses = {"QFT": (3.0, 3.2), "fp32 Lion": (3.0, 3.0)}
    rows = {
        name: [{"seed": seed, "after": {"King James": loss, "Wikipedia": 3.5}} for seed, loss in enumerate(of_seeds)]
        for name, of_seeds in losses.items()
    }
    run_of_example = {"text": "King James", "options": {**options, "dtype": "float32"}, "rows": rows}
    file = tmp_path / "qft.json"
    file.write_text(json.dumps({**run_of_example, "versions": "GPU; peft 0, torch 0"}))
    lines = run("quality.py", str(file), "--out", str(tmp_path / "out")).splitlines()
    assert [line for line in lines if line.startswith(("| QFT", "| fp32"))] == [
        "| QFT | 3.1000 ± 0.1000 | +3.33% | 2 |",
        "| fp32 Lion | 3.0000 |  | 2 |",
    ]
    with (tmp_path / "out" / "quality.csv").open() as table:
        recorded = [row for row in csv.DictReader(table) if row["corpus"] == "King James"]
    assert [(row["method"], row["bits"], row["seed"], row["train_tokens"]) for row in recorded] == [
        ("QFT", "8", "0", "640"),
        ("QFT", "8", "1", "640"),
        ("fp32 Lion", "32", "0", "640"),
        ("fp32 Lion", "32", "1", "640"),
    ]
    assert recorded[0]["command"].endswith("--dtype float32 --seeds 0 --only 'QFT'")


def test_pictures(tmp_path):
    for table in (BENCHMARKS / "results").glob("*.csv"):
        shutil.copy(table, tmp_path)
    run("plot.py", str(tmp_path))
    for name in ("memory_speed.png", "memory_quality.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_megabytes_are_those_of_the_checkpoints():
    code = "import plot; print(plot.megabytes(), plot.megabytes(4, 64), plot.megabytes(3, 64))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS, check=True)
    # bytes of the tensors of SmolLM2-135M in bf16 and as GPTQ checkpoints
    assert [round(1e6 * float(size)) for size in result.stdout.split()] == [269030016, 114523776, 101045376]


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        (("--method", "qft-stack"), ("qft-stack", "ours", "8", "-1")),
        (("--method", "qft-fused"), ("qft-fused", "ours", "8", "-1")),
        (
            ("--method", "full", "--peer", "torch", "--optimizer", "sgd", "--in-backward"),
            ("full", "torch", "16", ""),
        ),
    ),
)
def test_all_parameters(tmp_path, options, expected):
    run("train_step.py", *OPTIONS, *options, "--out", str(tmp_path))
    with (tmp_path / "train_step.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert tuple(row[name] for name in ("method", "peer", "bits", "group")) == expected
    assert float(row["bwd_ms"]) > 0
    if "--in-backward" in options:
        assert " SGD, in backward |" in run("table.py", str(tmp_path))


@pytest.mark.parametrize("method", ("peqa", "lrec", "qft-stack", "qft-fused"))
def test_a_long_run_prints_a_row_every_so_many_steps(monkeypatch, capsys, method):
    monkeypatch.syspath_prepend(BENCHMARKS)
    long_run = import_module("long_run")
    monkeypatch.setattr(long_run, "MAX_GROWTH_MB", math.inf)
    assert long_run.run(method, steps=6, every=2)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [f"| {method}: steps", "| 2", "| 4", "| 6"]
    assert len({row[2] for row in rows[1:]}) == 1
