"""Plots of layer errors before and after LREC's initialization."""

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
    """Plot the errors of all layers before and after initialization, with a row per block and a column per module.

    Args:
        report: one row per layer, as returned by [`initialize_lrec_weights`]. Output errors are plotted if measured.
        path: PNG file to write.

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
