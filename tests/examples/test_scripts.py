"""Every example runs from its first line to its last, copied alone, on a tiny random model."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gptq_models import load
from peft import get_peft_model
from tiny_assets import FLOAT_MODEL, GPTQ_MODEL
from transformers.utils import logging

from peft_quant import PEQAConfig


EXAMPLES = Path(__file__).parents[2] / "examples"
EVAL_DATA = ("--eval-data", "{assets}/king-james", "{assets}/wikipedia", "--windows", "2")
SHORT = ("--steps", "2", "--sequence-length", "64")
OPTIONS = {
    "lrec_correction": (
        *("--float-model", f"{{assets}}/{FLOAT_MODEL}", "--data", "{assets}/wikipedia", *EVAL_DATA, *SHORT),
        *("--task-data", "{assets}/king-james", "--calibration", "4", "--rank", "4"),
    ),
    "merge_and_serve": ("--adapter", "{adapters}/one", "--eval-data", "{assets}/king-james", "--windows", "2"),
    "mixed_batch_serving": (
        *("--adapters", "{adapters}/one", "{adapters}/other", "--prompts", "w1 w2", "w3 w4 w5", "--requests", "12"),
        *("--clients", "6", "--batch-size", "4", "--capacity", "4", "--max-new-tokens", "4"),
    ),
    "multi_gpu": ("--data", "{assets}/king-james", "--steps", "3", "--sequence-length", "64"),
    "multi_task_switching": (
        *("--tasks", "{assets}/king-james", "{assets}/wikipedia", "{assets}/wordnet"),
        *(*SHORT, "--windows", "2", "--switches", "6"),
    ),
    "peqa_finetuning": (
        *("--float-model", f"{{assets}}/{FLOAT_MODEL}", "--data", "{assets}/king-james", *EVAL_DATA, *SHORT),
    ),
    "qft_finetuning": ("--data", "{assets}/king-james", *EVAL_DATA, *SHORT),
    "sft_with_trl": ("--data", "{assets}/definitions-chat", "--steps", "2", "--batch-size", "2"),
}
PRINTED = {
    "lrec_correction": ["| initialized: whitened |", "| task, with the corrected adapter |"],
    "merge_and_serve": ["adapter against merged: 0 in the same arithmetic", "What is a lighthouse?\n> "],
    "mixed_batch_serving": ["12 answers of 2 adapters and the base: each is its adapter's own"],
    "multi_gpu": ["tokens/s together"],
    "multi_task_switching": ["logits are the same, whichever way"],
    "peqa_finetuning": ["| merged, plain transformers |", "adapter against merged: 0 in the same arithmetic"],
    "qft_finetuning": ["| QFT |", "logits of the export to gptq"],
    "sft_with_trl": ["| after |"],
}


@pytest.fixture(autouse=True)
def environment():
    """What the examples set in their process, they set for a test alone."""
    before, verbosity = dict(os.environ), logging.get_verbosity()
    yield
    os.environ.clear()
    os.environ.update(before)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def adapters(assets, tmp_path_factory):
    """A directory with two adapters, `one` and `other`."""
    directory = tmp_path_factory.mktemp("adapters")
    for name in ("one", "other"):
        config = PEQAConfig(task_type="CAUSAL_LM", init_weights=False)
        get_peft_model(load(assets / GPTQ_MODEL), config).save_pretrained(directory / name)
    return directory


def test_none_is_left_out():
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == PRINTED.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_it_runs(name, assets, adapters, tmp_path, monkeypatch, capfd):
    script = shutil.copy(EXAMPLES / name / f"{name}.py", tmp_path)
    model = FLOAT_MODEL if name == "qft_finetuning" else GPTQ_MODEL
    options = [option.format(assets=assets, adapters=adapters) for option in OPTIONS[name]]
    monkeypatch.setattr(sys, "argv", [script, "--model", str(assets / model), *options, "--out", "out"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script, run_name="__main__")
    printed = capfd.readouterr().out
    assert [line for line in PRINTED[name] if line not in printed] == []
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.py", "out"}


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP there")
def test_threads_sleep_while_they_wait():
    """As GNU's OpenMP itself says, which reads the environment when PyTorch is imported and not again."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    command = [sys.executable, "-c", "import peqa_finetuning"]
    cwd = EXAMPLES / "peqa_finetuning"
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "GOMP_SPINCOUNT = '0'" in result.stderr
