"""Figures of a page as inline SVG in the page's colors and font."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


# placeholder colors that are replaced by CSS; nothing else uses them
_INK, _GRID = "#0a0b0c", "#0d0e0f"
_SERIES = ("#1a0b01", "#1a0b02", "#1a0b03", "#1a0b04")
_CSS = {_INK: "currentColor", _GRID: "var(--line)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)
}
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": _GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_MARKED = 40  # lines of up to this many points have markers
_SIZE = re.compile(r' (?:width|height)="[^"]*pt"')
_NAMES = re.compile(r'<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', re.DOTALL)


@dataclass(frozen=True)
class Line:
    """Values over steps, at least one; values that are not finite are not drawn."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(*panels: Sequence[Line]) -> str:
    """Draw lines over steps in one or several stacked panels, with a legend in panels of several lines."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def draw(figure: Any) -> None:
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)
        for lines, (axes,) in zip(panels, rows):
            for line, color in zip(lines, itertools.cycle(_SERIES)):
                points = [point for point in zip(line.steps, line.values) if math.isfinite(point[1])]
                marker = "o" if len(points) <= _MARKED else None
                axes.plot(*zip(*points), color=color, marker=marker, markersize=3, linewidth=1.5, label=line.name)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(lines) > 1:
                axes.legend()
            elif len(panels) > 1:
                axes.set_title(lines[0].name, loc="left", fontsize=9)
        axes.set_xlabel("step")

    return svg(draw, (5.2, 2.9))


def svg(draw: Any, size: tuple[float, float]) -> str:
    """Render a figure as an SVG element.

    Args:
        draw: function that draws on a matplotlib figure, by default in the page's colors.
        size: width and height in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: `pip install matplotlib`.") from error

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = _NAMES.sub("", _SIZE.sub("", text[text.index("<svg") :]))
    for color, css in _CSS.items():
        text = text.replace(color, css)
    return text
