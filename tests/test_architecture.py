"""The house rules that imports can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peft_quant


ROOT = Path(peft_quant.__file__).parent

# a module imports from its own room and from floors below it
FLOORS = (
    {"compat", "deprecated", "docstrings", "files", "first_step", "module_names", "tables"},
    {"registry"},
    {"ops"},
    {"gptq"},
    {"evaluation", "inspection", "qft", "tuners"},
    {"estimate", "export", "plots"},
    {"trainers"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# what a command does is imported when it is run, so that `--help` answers at once
LIGHT = {"__future__", "typer", *sys.stdlib_module_names}
LAZY = {"auto_gptq", "bitsandbytes", "datasets", "gptqmodel", "matplotlib", "optimum", "triton"}
FORBIDDEN = {
    "ops": {"peft", "transformers"},
    "gptq": {"peft"},
    "qft": {"peft"},
    "inspection": {"peft", "transformers"},
    "plots": {"peft", "transformers"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "__init__.py")


def imports(path):
    """(module, level) of every import at module level, absolute for our own."""
    package = ("peft_quant", *path.relative_to(ROOT).parts[:-1])
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *([node.module] if node.module else [])]
            if node.module is None:
                yield from (".".join([*module, alias.name]) for alias in node.names)
            else:
                yield ".".join(module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        top, *rest = module.split(".")
        if top == "peft_quant":
            assert rest, f"{path} imports the whole package"
            assert rest[0] == room or FLOOR[rest[0]] < FLOOR[room], f"{path} imports {module}"
        elif room in ("cli", "__main__"):
            assert top in LIGHT, f"{path} imports {module}"
        elif not path.name.endswith("triton.py"):
            assert top not in LAZY | FORBIDDEN.get(room, set()), f"{path} imports {module}"


def test_only_trainers_import_the_trainer():
    for path in FILES:
        names = [
            alias.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("transformers")
            for alias in node.names
        ]
        if path.relative_to(ROOT).parts[0] != "trainers":
            assert not {"Trainer", "TrainingArguments", "TrainerCallback"} & set(names), path


def test_importing_is_light():
    code = """
import sys, time
import peft
before = set(sys.modules)
start = time.perf_counter()
import peft_quant
seconds = time.perf_counter() - start
import torch
heavy = {"triton", "gptqmodel", "optimum", "auto_gptq", "bitsandbytes", "datasets", "matplotlib"}
loaded = heavy & (set(sys.modules) - before)
assert not loaded, loaded
assert "transformers.trainer" not in sys.modules
assert not torch.cuda.is_initialized()
assert seconds < 1, seconds
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_public_names_exist():
    assert all(hasattr(peft_quant, name) for name in peft_quant.__all__)


def test_type_checkers_see_the_public_names_and_where_they_are_from():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not exported"
            seen.setdefault(node.module, set()).add(alias.name)
    assert seen == {module: set(names) for module, names in peft_quant._PUBLIC.items()}
    assert set(peft_quant.__all__) <= set(dir(peft_quant))
