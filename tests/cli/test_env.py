import importlib.metadata
import subprocess
import sys

import torch

import peft_quant


def test_a_table_of_what_is_there(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum", None)
    result = run("env")
    rows = dict(line.strip("| ").split(" | ", 1) for line in result.stdout.splitlines()[2:])
    assert result.code == 0
    assert rows["peft-quant"] == peft_quant.__version__
    assert rows["torch"] == torch.__version__
    assert rows["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert rows["optimum"].startswith(importlib.metadata.version("optimum") + ", cannot be imported: ")


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "peft_quant", "env"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("| what | found |\n|---|---|\n| peft-quant |")


def test_only_the_command_itself_registers_later(monkeypatch):
    def process(argv, orig_argv):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", orig_argv)
        return peft_quant._is_command_line()

    assert process(["/usr/bin/peft-quant", "env"], ["python", "/usr/bin/peft-quant", "env"])
    assert process(["-m", "env"], ["python", "-u", "-m", "peft_quant", "env"])
    assert not process(["-m", "-m", "peft_quant"], ["python", "-m", "pytest", "-m", "peft_quant"])
    assert not process(["train.py", "-m", "peft_quant"], ["python", "train.py", "-m", "peft_quant"])
    assert not process([], ["python"])
    assert not process([""], ["python"])
