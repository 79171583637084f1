"""Errors of a model's layers before and after a repair, as a picture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol


_KINDS = {"weight": "weight error", "activation": "output error, held-out tokens"}

_BLOCK = re.compile(r"(?P<members>.*?)\.(?P<position>\d+)\.(?P<module>.+)")


class LayerErrors(Protocol):
    """Relative errors of one layer; None where they are not known."""

    @property
    def name(self) -> str: ...
    @property
    def weight_error_before(self) -> float: ...
    @property
    def weight_error_after(self) -> float: ...
    @property
    def activation_error_before(self) -> float | None: ...
    @property
    def activation_error_after(self) -> float | None: ...


def plot_layer_errors(report: Iterable[LayerErrors], path: str | os.PathLike[str]) -> Path:
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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from error

    places = {row.name: place(row.name) for row in rows}
    blocks = sorted({block for block, _ in places.values()})
    one_list = len({members for members, _ in blocks}) == 1
    labels = [
        str(position) if one_list else f"{members}.{position}" if members else "" for members, position in blocks
    ]
    modules = list(dict.fromkeys(module for _, module in places.values()))
    kinds = [kind for kind in _KINDS if any(getattr(row, f"{kind}_error_before") is not None for row in rows)]
    figure = Figure(
        figsize=(4 + 0.8 * len(modules), len(kinds) * (2.2 + 0.2 * len(blocks))), dpi=120, layout="constrained"
    )
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for kind, panels in zip(kinds, axes):
        grids = {}
        for when in ("before", "after"):
            grid: list[list[Any]] = [[float("nan")] * len(modules) for _ in blocks]
            for row in rows:
                value = getattr(row, f"{kind}_error_{when}")
                if value is not None:
                    block, module = places[row.name]
                    grid[blocks.index(block)][modules.index(module)] = value
            grids[when] = grid
        values = [value for grid in grids.values() for line in grid for value in line if value == value]
        for panel, (when, grid) in zip(panels, grids.items()):
            image = panel.imshow(grid, aspect="auto", vmin=0, vmax=max(values), cmap="viridis")
            panel.set_title(f"{_KINDS[kind]}: {when}")
            panel.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
            panel.set_yticks(range(len(blocks)), labels)
            panel.set_ylabel("block")
        figure.colorbar(image, ax=list(panels))
    figure.savefig(path, format="png")
    return Path(path)


def place(name: str) -> tuple[tuple[str, int], str]:
    """The block of a layer, by list and position, and the layer's name there."""
    match = _BLOCK.fullmatch(name)
    return ((match["members"], int(match["position"])), match["module"]) if match else (("", 0), name)
