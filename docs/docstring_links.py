"""Links of docstrings, for mkdocstrings."""

import re
from pathlib import Path

import griffe


ENTRIES = {
    entry.rpartition(".")[2]: entry
    for entry in re.findall(r"^::: (\S+)$", Path(__file__).with_name("reference.md").read_text(), re.MULTILINE)
}
TYPES = re.compile(r"^ +\w+ \(.*`.*\):", re.MULTILINE)
"""Parameters with their types in PEFT's style, which is Markdown where mkdocstrings wants Python."""


class DocstringLinks(griffe.Extension):
    """Makes [`name`] and [`~package.name`], as docstrings write them, links where the reference has the name."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            text = re.sub(r"\[`~?([\w.]+)`\](?!\()", _link, obj.docstring.value)
            obj.docstring.value = TYPES.sub(lambda match: re.sub("[`*]", "", match[0]), text)


def _link(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{ENTRIES[name]}]" if name in ENTRIES else f"`{match[1]}`"
