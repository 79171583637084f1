"""Peak memory against speed, from `results/train_step.csv`: the 7B shape, 1 x 2048 tokens.

    python benchmarks/plot.py [DIRECTORY]

For every peer, method and bit width, the fastest settings.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import table
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


def fastest(directory: Path) -> dict[tuple[str, str, str], dict[str, tuple[float, float]]]:
    """(peak GB, tokens/s) of every (peer, method, bits), by checkpointing, on the GPU measured last."""
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


def draw(directory: Path) -> None:
    """Write `memory_speed.png`, unless nothing was measured on a GPU."""
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
    """Label each point where no marker and no other label is, as near to it as there is room."""
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
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else table.RESULTS)
