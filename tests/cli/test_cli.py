"""The program itself: how it starts, its exit codes and `--config`."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

import peft_quant
from peft_quant.cli import app, main


ROOT = Path(__file__).parents[2]
COMMANDS = [command.name for command in app.registered_commands]

HELP = """
import sys
from peft_quant.cli import main
for command in sys.argv[1:]:
    sys.argv = ["peft-quant", command, "--help"] if command != "-" else ["peft-quant", "--help"]
    try:
        main()
    except SystemExit as exit:
        assert not exit.code, exit.code
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


def test_help_imports_nothing_heavy():
    code = f"import sys\nsys.argv[0] = 'peft-quant'\n{HELP}"
    result = subprocess.run([sys.executable, "-c", code, "-", *COMMANDS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: peft-quant") == 1 + len(COMMANDS)


def test_help_of_the_module_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "peft_quant", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: peft-quant" in result.stdout
    assert re.search(r"\| +typer$", result.stderr, re.MULTILINE)
    assert not re.search(r"\| +(torch|transformers|peft)$", result.stderr, re.MULTILINE)


def test_every_command_and_every_option_says_what_it_does():
    commands = typer.main.get_command(app).commands
    assert list(commands) == COMMANDS
    for name, command in commands.items():
        assert command.help, name
        assert not [parameter.name for parameter in command.params if not parameter.help], name


def test_the_console_script_is_this_function():
    entry = re.search(r'^peft-quant = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert EntryPoint("peft-quant", entry[1], "console_scripts").load() is main


def test_version(run):
    result = run("--version")
    assert (result.code, result.stdout) == (0, f"peft-quant {peft_quant.__version__}\n")


@pytest.mark.parametrize("arguments", (["nonsense"], ["env", "--nonsense"], ["env", "nonsense"]))
def test_wrong_usage_exits_with_2(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert "nonsense" in result.stderr
    assert result.stdout == ""
