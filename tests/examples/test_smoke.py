"""Every example runs from its first line to its last, on a tiny random model."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging


EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "lrec_correction": ["| task: a second branch over it |"],
    "merge_and_serve": ["adapter against merged: 0 in the same arithmetic", "What is a lighthouse?\n> "],
    "multi_gpu": ["tokens/s together"],
    "multi_task_switching": ["logits are the same, whichever way"],
    "peqa_finetuning": ["adapter against merged: 0 in the same arithmetic"],
    "qft_finetuning": ["| fp32 Lion |"],
    "sft_with_trl": ["| after |"],
}


@pytest.fixture(autouse=True)
def environment():
    """What the examples set in their process, they set for a test alone."""
    before, verbosity = dict(os.environ), logging.get_verbosity()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as they do when they are imported, which is once
    yield
    os.environ.clear()
    os.environ.update(before)
    logging.set_verbosity(verbosity)


def test_none_is_left_out():
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_smoke(name, tmp_path, monkeypatch, capfd):
    script = EXAMPLES / name / f"{name}.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [str(script), "--smoke"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capfd.readouterr().out
    assert [line for line in PRINTED[name] if line not in printed] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP there")
def test_threads_sleep_while_they_wait():
    """As GNU's OpenMP itself says, which reads the environment when PyTorch is imported and not again."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    command = [sys.executable, "-c", "import stages"]
    result = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "GOMP_SPINCOUNT = '0'" in result.stderr
