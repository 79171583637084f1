"""Plots of how far adapters moved a model's layers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..inspection import LayerChange
from .heat_map import Panel, heat_map


def plot_layer_changes(
    changes: Iterable[LayerChange],
    path: str | os.PathLike[str],
    *,
    other: Iterable[LayerChange] | None = None,
    titles: Sequence[str] = ("first adapter", "second adapter"),
) -> Path:
    """Plot how far an adapter moved each layer, or two adapters side by side on one color scale.

    Relative changes are plotted if all are known, otherwise absolute ones: the root mean square for scales, the
    Frobenius norm for weights.

    Args:
        changes: one row per layer, as returned by `peft_quant.inspection.layer_changes`.
        path: PNG file to write.
        other: the same for a second adapter.
        titles: titles of the two adapters, used if `other` is given.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an adapter has no layers.
    """
    adapters = [list(rows) for rows in (changes, other) if rows is not None]
    if not all(adapters):
        raise ValueError("The adapter changes no GPTQ layer: there is nothing to draw.")
    relative = all(row.relative is not None for rows in adapters for row in rows)
    moved = {"weights" if row.rank else "scales" for rows in adapters for row in rows}
    kind = f"{'relative ' if relative else ''}change of {' or '.join(sorted(moved))}"
    panels = [
        Panel(title, {row.name: (row.relative or 0.0) if relative else row.absolute for row in rows})
        for title, rows in zip(titles if len(adapters) == 2 else [""], adapters)
    ]
    heat_map([panels], kind, percent=relative).savefig(path, format="png")
    return Path(path)
