"""Help texts of configuration fields, taken from docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import MappingProxyType
from typing import TypeVar


_Class = TypeVar("_Class")


def help_from_docstring(config_class: type[_Class]) -> type[_Class]:
    """Set `metadata["help"]` of a dataclass's own (not inherited) fields to their text under `Args`.

    Raises:
        KeyError: a field is not in the docstring.
    """
    if config_class.__doc__ is None:  # `python -OO`
        return config_class
    entries = re.findall(
        r"^    (\w+) \(.*?\):\s(.*?)(?=\n    \S|\n\n)",
        inspect.cleandoc(config_class.__doc__),
        re.DOTALL | re.MULTILINE,
    )
    texts = {name: re.sub(r"\[(`[^`]+`)\]", r"\1", " ".join(text.split())) for name, text in entries}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if field.name in config_class.__annotations__:
            field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name]})
    return config_class
