"""Heat maps of one number per layer: a row per block, a column per module of a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from ..module_names import Block, split_block


@dataclass(frozen=True)
class Panel:
    """One grid.

    Attributes:
        title: title above the grid.
        values: one number per layer, by layer name; layers without one are blank.
    """

    title: str
    values: Mapping[str, float]


def heat_map(rows: Sequence[Sequence[Panel]], scale: str | None = None, percent: bool = False) -> Any:
    """Draw panels in rows, as a matplotlib `Figure`.

    All panels show the same blocks and modules. Panels of a row share a color scale that starts at 0.

    Args:
        rows: rows of panels, all of the same length.
        scale: label of the color bars.
        percent: whether color bars show percentages.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from error

    labels, modules, cells = grid_of(name for panels in rows for panel in panels for name in panel.values)
    figure = Figure(
        figsize=(len(rows[0]) * (2 + 0.4 * len(modules)), len(rows) * (2.2 + 0.2 * len(labels))),
        dpi=120,
        layout="constrained",
    )
    for panels, line in zip(rows, figure.subplots(len(rows), len(rows[0]), squeeze=False)):
        highest = max(value for panel in panels for value in panel.values.values())
        for axes, panel in zip(line, panels):
            grid: list[list[Any]] = [[float("nan")] * len(modules) for _ in labels]
            for name, value in panel.values.items():
                block, module = cells[name]
                grid[block][module] = value
            image = axes.imshow(grid, aspect="auto", vmin=0, vmax=highest, cmap="viridis")
            axes.set_title(fill(panel.title, 10 + 4 * len(modules)), parse_math=False)
            axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylabel("block")
        figure.colorbar(image, ax=list(line), label=scale, format=PercentFormatter(1) if percent else None)
    return figure


def grid_of(names: Iterable[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Labels of the blocks in order, names of the modules, and each layer's block and module indices by name."""
    places = {}
    for name in names:
        block, module = split_block(name)
        places[name] = block or Block("", 0), module
    blocks = sorted({block for block, _ in places.values()})
    modules = list(dict.fromkeys(module for _, module in places.values()))
    one_list = len({block.blocks for block in blocks}) == 1
    labels = [str(block.position) if one_list else str(block) if block.blocks else "" for block in blocks]
    return (
        labels,
        modules,
        {name: (blocks.index(block), modules.index(module)) for name, (block, module) in places.items()},
    )
