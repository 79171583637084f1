"""Renders a training report as a self-contained HTML file."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...estimate.report import MemoryRow
from ...files import new_file
from ...plots.heat_map import grid_of
from .figures import Line, line_chart, svg


_TERMS = {"kl": "KL to the float model", "ce": "cross entropy", "hidden": "hidden states"}
_LABELS = 40  # block labels that fit on an axis


@dataclass(frozen=True)
class Evaluation:
    """The loss on one evaluation set, in nats per token if it has a perplexity; None if unknown."""

    name: str
    before: float | None
    after: float | None
    has_perplexity: bool


@dataclass(frozen=True)
class Sample:
    """The model's answers to a prompt before and after training; None if it was not run."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Changes:
    """How far training moved each layer.

    Attributes:
        what: description of the numbers.
        layers: change as a fraction, by layer name.
    """

    what: str
    layers: Mapping[str, float]


@dataclass(frozen=True)
class TrainingReport:
    """Contents of a training report. Fields that are empty or None are left out of the page.

    Attributes:
        title: title of the page.
        status: progress of the run.
        summary: facts by name.
        command: arguments of the command.
        log: log entries with a `step`, as in `trainer.state.log_history`.
        memory: one row per kind of tensor.
        peak: what was measured, and its bytes.
        changes: changes of the layers.
        evaluations: losses before and after training.
        samples: generated text before and after training.
        seconds: training time.
        versions: package versions by name.
    """

    title: str
    status: str
    summary: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()
    log: Sequence[Mapping[str, float]] = ()
    memory: Sequence[MemoryRow] = ()
    peak: tuple[str, int] | None = None
    changes: Changes | None = None
    evaluations: Sequence[Evaluation] = ()
    samples: Sequence[Sample] = ()
    seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def write_training_report(report: TrainingReport, path: str | os.PathLike[str]) -> Path:
    """Write the report atomically as an HTML file, and create its directory if needed.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    text = _render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")
    return path


def _render(report: TrainingReport) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": format_bytes, "number": _format_number}
    template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        tiles=_tiles(report),
        command=shlex.join(report.command),
        charts=[(title, Markup(line_chart(*panels))) for title, panels in _charts(report.log)],
        most=max((row.bytes for row in report.memory), default=0),
        heat_map=Markup(_heat_map(report.changes.layers)) if report.changes and report.changes.layers else None,
        perplexity=any(evaluation.has_perplexity for evaluation in report.evaluations),
        exp=_exp,
    )


def _tiles(report: TrainingReport) -> list[tuple[str, str, str]]:
    """Name, value and former value of the headline figures."""
    tiles = []
    if report.evaluations:
        first = report.evaluations[0]
        shown = _exp if first.has_perplexity else float
        before, after = ("" if loss is None else _format_number(shown(loss)) for loss in (first.before, first.after))
        name = " ".join(
            ["Perplexity" if first.has_perplexity else "Evaluation loss", *([first.name] * bool(first.name))]
        )
        tiles.append((name, after or before, before if after else ""))
    losses = _line(report.log, "loss", "")
    if losses:
        first_loss = _format_number(losses.values[0]) if len(losses.values) > 1 else ""
        tiles.append(("Training loss", _format_number(losses.values[-1]), first_loss))
    if report.peak:
        tiles.append(("Peak memory", format_bytes(report.peak[1]), ""))
    if report.seconds is not None:
        tiles.append(("Time", format_seconds(report.seconds), ""))
    return tiles


def _charts(log: Sequence[Mapping[str, float]]) -> list[tuple[str, list[list[Line]]]]:
    """Panels by title. Of four possible charts, three are merged into two, for an even number."""
    evaluations = dict.fromkeys(
        key for entry in log for key in entry if key.startswith("eval_") and key.endswith("_loss")
    )
    candidates = {
        "Loss": {"loss": "training"} | {key: _name_of(key) for key in evaluations},
        "Terms of the loss": _TERMS if any("kl" in entry for entry in log) else {},
        "Learning rate": {"learning_rate": "learning rate"},
        "Norm of the gradients": {"grad_norm": "norm of the gradients"},
    }
    charts = []
    for title, names in candidates.items():
        lines = [line for key, name in names.items() if (line := _line(log, key, name))]
        if any(len(line.steps) > 1 for line in lines):
            charts.append((title, [lines]))
    if len(charts) == 3:
        (first, above), (second, below) = charts[1:]
        charts[1:] = [(f"{first} and {second.lower()}", above + below)]
    return charts


def _name_of(key: str) -> str:
    return " ".join(["evaluation", key.removeprefix("eval_").removesuffix("loss").strip("_")]).strip()


def _line(log: Sequence[Mapping[str, float]], key: str, name: str) -> Line | None:
    points = [
        (entry["step"], entry[key]) for entry in log if math.isfinite(entry.get(key, math.nan)) and "step" in entry
    ]
    return Line(name, *zip(*points)) if points else None


def _heat_map(layers: Mapping[str, float]) -> str:
    """A heat map with a row per module and a column per block, because a page is wide."""
    from matplotlib.ticker import PercentFormatter

    labels, modules, cells = grid_of(layers)
    grid = [[math.nan] * len(labels) for _ in modules]
    for name, value in layers.items():
        block, module = cells[name]
        grid[module][block] = value
    every = -(-len(labels) // _LABELS)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", vmin=0, cmap="viridis", interpolation="none")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_yticks(range(len(modules)), modules)
        axes.set_xticks(range(0, len(labels), every), labels[::every])
        axes.set_xlabel("block")
        figure.colorbar(image, ax=axes, format=PercentFormatter(1), pad=0.02).outline.set_visible(False)

    return svg(draw, (9.5, 1.0 + 0.27 * len(modules)))


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """Format a duration in hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700))  # avoids overflow for diverged runs


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
