"""The house rules that imports can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peft_quant


ROOT = Path(peft_quant.__file__).parent

# what the modules of a package may import: packages of ours, and which others are forbidden at module level
ALLOWED = {
    "ops": {"ops"},
    "gptq": {"gptq", "ops"},
    "qft": {"qft", "gptq", "ops", "registry", "report", "proof", "resume"},
    "tuners": {"tuners", "gptq", "ops", "registry", "report", "compat", "proof"},
    "report": {"report", "gptq"},
    "inspection": {"inspection", "gptq", "ops", "report"},
    "callbacks": {"inspection", "gptq", "proof", "qft", "report", "tuners"},
    "estimate": {"estimate", "tuners", "qft", "gptq", "ops", "report"},
    "registry": set(),
    "compat": set(),
    "proof": set(),
    "text": set(),
    "perplexity": set(),
    "loading": {"gptq"},
    "resume": set(),
    "cli": {"cli", "compat"},
    "__main__": {"cli"},
}
# what a command does is imported when it is run, so that `--help` answers at once
LIGHT = {"__future__", "typer", *sys.stdlib_module_names}
FORBIDDEN = {
    "ops": {"peft", "transformers", "accelerate", "gptqmodel", "optimum", "auto_gptq", "triton"},
    "gptq": {"peft", "gptqmodel", "optimum", "auto_gptq", "triton"},
    "qft": {"peft", "gptqmodel", "optimum", "auto_gptq", "triton"},
    "tuners": {"gptqmodel", "optimum", "auto_gptq", "triton"},
    "report": {"peft", "transformers", "gptqmodel", "optimum", "auto_gptq", "triton", "matplotlib"},
    "inspection": {"peft", "transformers", "gptqmodel", "optimum", "auto_gptq", "triton", "matplotlib"},
    "callbacks": {"gptqmodel", "optimum", "auto_gptq", "triton", "matplotlib"},
    "estimate": {"gptqmodel", "optimum", "auto_gptq", "triton", "bitsandbytes"},
    "registry": {"gptqmodel", "optimum", "auto_gptq", "triton"},
    "compat": {"gptqmodel", "optimum", "auto_gptq", "triton"},
    "proof": {"peft", "transformers", "gptqmodel", "optimum", "auto_gptq", "triton"},
    "text": {"datasets", "peft", "transformers", "gptqmodel", "optimum", "auto_gptq", "triton"},
    "perplexity": {"peft", "transformers", "gptqmodel", "optimum", "auto_gptq", "triton"},
    "loading": {"gptqmodel", "optimum", "auto_gptq", "triton"},
    "resume": {"peft", "gptqmodel", "optimum", "auto_gptq", "triton"},
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
            assert rest[0] in ALLOWED[room], f"{path} imports {module}"
        elif room in ("cli", "__main__"):
            assert top in LIGHT, f"{path} imports {module}"
        elif not path.name.endswith("triton.py"):
            assert top not in FORBIDDEN[room], f"{path} imports {module}"


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


def test_the_lazy_names_are_the_public_ones():
    assert set(peft_quant._LAZY) == set(peft_quant.__all__) <= set(dir(peft_quant))
