"""The house rules that imports can hold."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from import_graph import edges, imports, reachable

import peft_quant


ROOT = Path(peft_quant.__file__).parent

# a module imports from its own room and from floors below it
FLOORS = (
    {"compat", "deprecated", "docstrings", "files", "first_step", "module_names", "patterns", "reading", "tables"},
    {"adapter_files", "model_config", "optimizer_steps", "registry"},
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


def root_name(node):
    """`a` of `a.b[0].c`."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def writes_into_other_packages(tree):
    """Attributes and items set on anything imported from another package, by any name, except in its `config`."""
    nodes = list(ast.walk(tree))
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for alias in node.names
    }
    values = [(node.targets, node.value) for node in nodes if isinstance(node, ast.Assign)]
    values += [([node.target], node.value) for node in nodes if isinstance(node, ast.AnnAssign) and node.value]
    for targets, value in values:
        if isinstance(value, ast.Name | ast.Attribute) and root_name(value) in foreign:
            foreign |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if root_name(node) in foreign and ".config." not in ast.unparse(node):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and re.search(r"\b(set|del)attr|__setattr__", ast.unparse(node.func)):
            yield from [ast.unparse(node)] if root_name(node.args[0]) in foreign else []


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imported_modules_exist(path):
    for module in imports(path, nested=True):
        top, *parts = module.split(".")
        file = ROOT.joinpath(*parts)
        if top == "peft_quant" and not file.is_dir() and not file.with_suffix(".py").is_file():
            assert hasattr(import_module(module.rpartition(".")[0]), parts[-1]), f"{path} imports {module}"


def test_rooms_form_no_circle():
    graph = edges()
    assert [room for room in graph if room in reachable(graph, room)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_registry_writes_into_other_packages(path):
    written = list(writes_into_other_packages(ast.parse(path.read_text())))
    if path == ROOT / "registry.py":
        assert {"quantizer.GPTQ", "BaseTunerLayer.weight"} <= set(written)
    else:
        assert written == []


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


def test_only_export_knows_of_readmes():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "export":
            assert "README" not in path.read_text(), path


def test_importing_is_light():
    code = """
import sys
import peft
before = set(sys.modules)
import peft_quant
import torch
heavy = {"triton", "gptqmodel", "optimum", "auto_gptq", "bitsandbytes", "datasets", "matplotlib"}
loaded = heavy & (set(sys.modules) - before)
assert not loaded, loaded
assert "transformers.trainer" not in sys.modules
assert not torch.cuda.is_initialized()
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
