"""Help of configuration fields, which is written in docstrings alone."""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import MappingProxyType
from typing import TypeVar


_Class = TypeVar("_Class")


def help_from_docstring(config_class: type[_Class]) -> type[_Class]:
    """Give the fields of a dataclass, but inherited ones, their text under `Args` as `metadata["help"]`.

    Raises:
        KeyError: a field that the docstring does not have.
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
