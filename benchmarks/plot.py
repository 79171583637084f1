"""Draws the documentation's plots from the tables in `results`.

    python benchmarks/plot.py [DIRECTORY]

`memory_speed.png`, from `train_step.csv`: peak memory against speed, on the 7B shape, 1 x 2048 tokens. For every peer,
method and bit width, the fastest settings.

`memory_quality.png`, from `quality.csv`: the size of SmolLM2-135M against its perplexity on held-out text, mean over
seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import quality
import table
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, IdentityTransform


LAYERS, TOKENS = "32", "1 x 2048"
MARKERS = {"peqa": "o", "lora": "s", "lrec": "^"}
NAMES = {"peqa": "PEQA", "lora": "LoRA", "lrec": "LREC"}
COLORS = {
    "ours": "tab:blue",
    "peft": "black",
    "gptqmodel": "tab:orange",
    "bitsandbytes": "tab:green",
    "hqq": "tab:purple",
    "unsloth": "tab:red",
}

# SmolLM2-135M: inputs and outputs of the matrices of a block, and the bf16 values that are not quantized
BLOCKS = 30
MATRICES = (*2 * [(576, 576)], *2 * [(576, 192)], *2 * [(576, 1536)], (1536, 576))
OTHER_VALUES = 49152 * 576 + 61 * 576  # embeddings (tied to the head) and norms
BRANCHES = {  # rows of the table, without bits and groups: name, marker, color
    ("eora", "eora", "0"): ("EoRA", "D", "tab:orange"),
    ("lora", "zero", "819200"): ("LoRA, text alone", "s", "tab:green"),
    ("rilq", "svd", "819200"): ("RILQ's loss", "v", "tab:purple"),
    ("lrec", "whitened", "819200", "--ce-weight 0.5", "--top-k 64"): ("LREC, ce_weight=0.5", "^", "tab:blue"),
}
BASES = (("2", "64"), ("2", "32"), ("3", "64"), ("4", "64"))
RANK = 32


def fastest(directory: Path) -> dict[tuple[str, str, str], dict[str, tuple[float, float]]]:
    """(peak GB, tokens/s) of every (peer, method, bits), by checkpointing, on the most recently measured GPU."""
    rows = {row: cells for row, cells in table.read(directory).items() if not row.gpu.startswith("cpu")}
    gpu = list(rows)[-1].gpu if rows else None
    points: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    for row, cells in rows.items():
        if (row.gpu, row.layers, row.tokens) != (gpu, LAYERS, TOKENS) or row.method not in NAMES:
            continue
        best = points.setdefault((row.peer, row.method, row.bits), {})
        for checkpointing, cell in cells.items():
            speed = 2048e3 / cell.milliseconds
            if cell.gigabytes is not None and speed > best.get(checkpointing, (0, 0))[1]:
                best[checkpointing] = (cell.gigabytes, speed)
    return points


def megabytes(bits: int = 16, group: int = 0, rank: int = 0) -> float:
    """Size of SmolLM2-135M in MB: packed layers as in a GPTQ checkpoint, an adapter in fp32, the rest in bf16.

    A matrix with K inputs and N outputs takes `bits * K * N` bits for integers, 16 bits and a zero point of `bits` for
    each of its `K / group * N` scales, and 32 K bits for the groups of its rows; an adapter `32 * rank * (K + N)`.
    """
    total = 16 * OTHER_VALUES
    for inputs, outputs in MATRICES * BLOCKS:
        total += bits * inputs * outputs + 32 * rank * (inputs + outputs)
        if group:
            total += (16 + bits) * inputs // group * outputs + 32 * inputs
    return total / 8e6


def draw_quality(directory: Path) -> None:
    """Write `memory_quality.png`, unless no perplexities were recorded."""
    if not (directory / "quality.csv").is_file():
        return
    cells, _ = quality.read(directory)
    if not cells:
        return
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for corpus, axes in zip(quality.CORPORA.values(), panels):

        def perplexity(*row: str, corpus: str = corpus) -> float:
            return statistics.fmean(cells[row][corpus]) if cells[row][corpus] else math.nan

        floor = perplexity("float", "", "", "", "0")
        axes.axhline(floor, color="black", linewidth=1, linestyle=":", label=f"float, {megabytes():.0f} MB")
        series = {("gptq", "", "0"): ("GPTQ", "o", "gray", 0)}
        series |= {row: (*style, RANK) for row, style in BRANCHES.items()}
        for (method, start, *options), (name, marker, color, rank) in series.items():
            sizes = [megabytes(int(bits), int(group), rank) for bits, group in BASES]
            values = [perplexity(method, start, *base, *options) for base in BASES]
            axes.plot(sizes, values, f"{marker}-", color=color, markersize=6, linewidth=1, alpha=0.85, label=name)
            if method in ("gptq", "lrec"):
                for (bits, group), *place in zip(BASES, sizes, values):
                    axes.annotate(
                        f"{bits} bits g{group}",
                        place,
                        (-6, -3),
                        textcoords="offset points",
                        fontsize=8,
                        color=color,
                        horizontalalignment="right",
                        verticalalignment="top",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0},
                    )
        axes.set(xlabel="MB of the model, with its adapter of rank 32", xlim=(75, 160), yscale="log")
        axes.set(ylim=(floor / 1.4, 1.4 * axes.get_ylim()[1]), title=f"{corpus}, held-out")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity")
    panels[1].legend(loc="upper right")
    figure.savefig(directory / "memory_quality.png", dpi=150)
    plt.close(figure)


def draw_speed(directory: Path) -> None:
    """Write `memory_speed.png`, unless nothing was measured on a GPU."""
    if not (directory / "train_step.csv").is_file():
        return
    points = fastest(directory)
    if not points:
        return
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    panel_labels = []
    for checkpointing, axes in enumerate(panels):
        labels = []
        for (peer, method, bits), best in points.items():
            if str(checkpointing) in best:
                place = best[str(checkpointing)]
                axes.plot(*place, MARKERS[method], color=COLORS[peer], markersize=8)
                labels.append((place, f"{NAMES[method]} {bits} bits, {peer}", COLORS[peer]))
        axes.set(xlabel="peak GB", xlim=(0, 1.25 * axes.get_xlim()[1]), ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.set_title("gradient checkpointing" if checkpointing else "no checkpointing")
        axes.grid(alpha=0.3)
        panel_labels.append(labels)
    panels[0].set_ylabel("tokens/s")
    figure.canvas.draw()
    for axes, labels in zip(panels, panel_labels):
        place_labels(axes, labels)
    figure.savefig(directory / "memory_speed.png", dpi=150)
    plt.close(figure)


def place_labels(axes: plt.Axes, labels: list[tuple[tuple[float, float], str, str]]) -> None:
    """Label each point as close to it as possible without covering markers or other labels."""
    places = [axes.transData.transform(place) for place, _, _ in labels]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    shifts = sorted(itertools.product(range(-60, 61, 3), repeat=2), key=lambda shift: math.hypot(*shift))
    for (x, y), (place, name, color) in zip(places, labels):
        text = axes.text(0, 0, name, fontsize=8, color=color, transform=IdentityTransform())
        size = text.get_window_extent()
        for right, up in shifts:
            left = x + 9 + right if right >= 0 else x - 9 + right - size.width
            box = Bbox.from_bounds(left, y + up - size.height / 2, size.width, size.height)
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                break
        taken.append(box)
        if math.hypot(right, up) > 15:
            end = axes.transData.inverted().transform((box.x0 if right >= 0 else box.x1, (box.y0 + box.y1) / 2))
            axes.plot(*zip(place, end), color=color, linewidth=0.6)
        corner = axes.transData.inverted().transform(box.p0)
        text.set(position=corner, transform=axes.transData, verticalalignment="bottom")


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else table.RESULTS
    draw_speed(results)
    draw_quality(results)
