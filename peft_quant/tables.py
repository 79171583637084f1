"""Formatting of tables, lists and values as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows of cells, with the first `left` columns left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format rows as a Markdown table: floats with four digits, None as an empty cell."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [[cell(value) for value in row] for row in (header, *rows)]
    return "\n".join(
        [f"| {' | '.join(lines[0])} |", "|" + "---|" * len(header), *(f"| {' | '.join(line)} |" for line in lines[1:])]
    )


def bullet_list(heading: str, lines: Sequence[str], most: int = 10) -> str:
    """Format lines under a heading, at most `most` of them."""
    shown = [f"- {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"- and {len(lines) - most} more")
    return "\n".join([f"{heading}:", *shown])


def format_value(value: object) -> str:
    """Format a configuration value."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def format_number(value: float | None, form: str = ".3g") -> str:
    """Format a number; None becomes a dash."""
    return "-" if value is None else f"{value:{form}}"
