"""What stands in the tables of an inspection."""

from __future__ import annotations

import re
from collections.abc import Sequence


def word(value: object) -> str:
    """A value of a configuration."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def number(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash for one that is not known."""
    return "-" if value is None else f"{value:{form}}"


def listed(heading: str, lines: Sequence[str], most: int = 10) -> str:
    """Lines under a heading, the first ones if there are many."""
    shown = [f"- {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"- and {len(lines) - most} more")
    return "\n".join([f"{heading}:", *shown])


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names of layers by the numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
