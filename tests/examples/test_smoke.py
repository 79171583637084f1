"""Every example runs from its first line to its last, on a tiny random model."""

import os
import runpy
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
