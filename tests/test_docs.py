"""The README and the documentation name what there is."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import MODULES, ROOMS, mermaid

import peft_quant


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
]
ENTRIES = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)


def without_code(text):
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """Of headings, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


class TestReference:
    def test_has_every_public_name(self):
        assert sorted(name for name in ENTRIES if name.count(".") == 1) == [
            f"peft_quant.{name}" for name in sorted(peft_quant.__all__)
        ]

    @pytest.mark.parametrize("name", peft_quant.__all__)
    def test_docstrings(self, name):
        public = getattr(peft_quant, name)
        docstring = public.__dict__.get("__doc__") if isinstance(public, type) else public.__doc__
        assert docstring, f"{name} has no docstring"
        summary = inspect.cleandoc(docstring).split("\n\n")[0].rstrip()
        assert summary.endswith((".", ":")), f"{name}: {summary}"
        if inspect.isfunction(public):
            described = re.split(r"^(?:Returns|Raises|Example):$", inspect.cleandoc(docstring), flags=re.MULTILINE)[0]
            for parameter in inspect.signature(public).parameters:
                assert re.search(rf"^    [*]*{parameter}\b.*:", described, re.MULTILINE), parameter


@pytest.mark.parametrize("name", ("PEQAConfig", "LRECConfig", "QFTTrainingArguments", "DistillationTrainingArguments"))
def test_help_of_fields_is_what_the_docstring_says(name):
    config = getattr(peft_quant, name)
    plain = " ".join(config.__doc__.split()).replace("[`", "`").replace("`]", "`")
    own = [option for option in dataclasses.fields(config) if option.name in config.__annotations__]
    assert own
    for option in own:
        assert option.metadata["help"].endswith("."), option.name
        assert re.search(rf" {option.name} \(.*?\): {re.escape(option.metadata['help'])} ", plain), option.name


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_resolve(self, page):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
            if link.startswith("https://"):
                continue
            target, _, anchor = link.partition("#")
            file = page.parent / target if target else page
            assert file.exists(), link
            if anchor:
                assert anchor in anchors(file.read_text(encoding="utf-8")), link

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_files_that_are_named_exist(self, page):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b((?:benchmarks|examples|hub_cards|tests|docs)/[\w/]+\.\w+)", text):
            assert (ROOT / name).exists(), name

    def test_tests_that_are_named_exist(self):
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "reliability.md").read_text(encoding="utf-8"))
        assert named
        for file, name in named:
            assert re.search(rf"\b(?:class|def) {name}\b", (ROOT / file).read_text(encoding="utf-8")), name


class TestContributing:
    TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("name", [*(f"{room}/" for room in ROOMS), *(f"{module}.py" for module in MODULES)])
    def test_layout_names_every_room(self, name):
        layout = self.TEXT.partition("| beside the package |")[0]
        assert f"`{name}`" in layout

    def test_the_diagram_is_what_the_script_prints(self):
        assert f"```mermaid\n{mermaid()}\n```" in self.TEXT

    @pytest.mark.parametrize(("file", "name"), re.findall(r"`([\w/]+\.py)`, `([\w.]+)`", TEXT))
    def test_walks_name_what_there_is(self, file, name):
        code = (ROOT / "peft_quant" / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b(?:class|def) {part}\b", code), part


@pytest.mark.parametrize(("script", "page"), (("table.py", "performance.md"), ("quality.py", "quality.md")))
def test_numbers_are_what_the_benchmarks_print(script, page):
    command = [sys.executable, str(ROOT / "benchmarks" / script)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if script == "quality.py":  # the tables of LREC are put together from several
        printed = printed[printed.index("Full fine-tuning") :]
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [row for row in rows if row not in text] == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="pages are built by `make`, which needs Python 3.11")
def test_site(tmp_path):
    """The pages build without a warning, have an anchor for every name, and ask for nothing from the network."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for name in ENTRIES:
        assert f'id="{name}"' in reference, name
    for page in tmp_path.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?(\S+)|<link[^>]* href=[\"']?(\S+)", html)
        assert not [url for urls in loaded for url in urls if re.match(r"https?:|//", url)], page.name
