"""The distributions hold what the package needs, and install."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import peft_quant


ROOT = Path(__file__).parent.parent
VERSION = peft_quant.__version__
# what is no module
DATA = {
    "peft_quant/py.typed",
    "peft_quant/trainers/report/page.html",
    *(f"peft_quant/hub_cards/{card.name}" for card in (ROOT / "hub_cards").glob("*.md")),
}
MODULES = {str(file.relative_to(ROOT)) for file in (ROOT / "peft_quant").rglob("*.py")}


def run(*arguments, cwd, **environment):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    result = subprocess.run([*map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source distribution and wheel, the second from the first, as a release has them."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")  # setuptools leaves things in the tree it builds
    for name in ("peft_quant", "hub_cards"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree)
    out = tree / "dist"
    result = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    assert "is absent from the `packages` configuration" not in result.stdout + result.stderr
    return out / f"peft_quant-{VERSION}.tar.gz", out / f"peft_quant-{VERSION}-py3-none-any.whl"


def test_sdist(built):
    with tarfile.open(built[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} | DATA | MODULES <= names
    assert not [name for name in names if name.startswith("tests/")]


def test_wheel(built):
    with zipfile.ZipFile(built[1]) as file:
        names = set(file.namelist())
        information = f"peft_quant-{VERSION}.dist-info"
        metadata = HeaderParser().parsestr(file.read(f"{information}/METADATA").decode())
        scripts = file.read(f"{information}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(information)} == DATA | MODULES
    assert f"{information}/licenses/LICENSE" in names
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "peft-quant = peft_quant.cli:main" in scripts


def test_installed(built, tmp_path):
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--target", target, built[1], cwd=tmp_path)
    for name in DATA:
        assert (target / name).read_bytes() == (ROOT / name).read_bytes()
    path = {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    origin = "import importlib.util; print(importlib.util.find_spec('peft_quant').origin)"
    found = run(sys.executable, "-c", origin, cwd=tmp_path, **path).stdout.strip()
    assert Path(found) == target / "peft_quant/__init__.py"
    for command in ((sys.executable, "-m", "peft_quant"), (sys.executable, target / "bin/peft-quant")):
        assert VERSION in run(*command, "--version", cwd=tmp_path, **path).stdout
