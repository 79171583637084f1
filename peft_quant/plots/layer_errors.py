"""Errors of a model's layers before and after LREC's initialization, as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .heat_map import Panel, heat_map


if TYPE_CHECKING:
    from ..tuners.lrec.initialization.initialize import LayerInitialization

_KINDS = {"weight": "weight error", "activation": "output error, held-out tokens"}


def plot_layer_errors(report: Iterable[LayerInitialization], path: str | os.PathLike[str]) -> Path:
    """Draw the errors of all layers before and after, a row for every block and a column for every module in it.

    Args:
        report: a row a layer, as [`initialize_lrec_weights`] returns them. Output errors are drawn if there are any.
        path: file to write, a PNG.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report is empty.
    """
    rows = list(report)
    if not rows:
        raise ValueError("The report has no layers: there is nothing to draw.")
    panels = []
    for kind, title in _KINDS.items():
        errors = {when: _values(rows, f"{kind}_error_{when}") for when in ("before", "after")}
        if errors["before"]:
            panels.append([Panel(f"{title}: {when}", values) for when, values in errors.items()])
    heat_map(panels).savefig(path, format="png")
    return Path(path)


def _values(rows: Iterable[LayerInitialization], error: str) -> dict[str, float]:
    return {row.name: getattr(row, error) for row in rows if getattr(row, error) is not None}
