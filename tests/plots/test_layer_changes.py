"""What the pictures show, by matplotlib's own axes."""

import math
import sys
from types import SimpleNamespace

import pytest

from peft_quant import plot_layer_changes
from peft_quant.plots.heat_map import Panel, heat_map


MODULES = ("self_attn.q_proj", "mlp.up_proj")


def change(block, module, relative, rank=None):
    name = f"model.layers.{block}.{module}"
    return SimpleNamespace(name=name, absolute=100 * (relative or 1), relative=relative, rank=rank)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    return figures


def grids(figure):
    return [axes.images[0].get_array().tolist() for axes in figure.axes if axes.images]


def test_every_number_has_its_place(drawn, tmp_path):
    rows = [change(block, module, (10 * block + i) / 1000) for block in (10, 2) for i, module in enumerate(MODULES)]
    path = plot_layer_changes(rows, tmp_path / "changes.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    (grid,) = grids(figure)
    assert grid == [[0.02, 0.021], [0.1, 0.101]]  # blocks by number, not by name
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "10"]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(MODULES)
    assert axes.images[0].get_clim() == (0, 0.101)
    assert bar.get_ylabel() == "relative change of scales"
    figure.canvas.draw()
    assert all("%" in label.get_text() for label in bar.get_yticklabels())


def test_two_adapters_on_one_scale(drawn, tmp_path):
    first = [change(block, module, 0.01) for block in (0, 1) for module in MODULES]
    second = [change(1, module, 0.2, rank=4) for module in MODULES]
    plot_layer_changes(first, tmp_path / "two.png", other=second, titles=("a", "b"))
    (figure,) = drawn
    left, right, bar = figure.axes
    assert [left.get_title(), right.get_title()] == ["a", "b"]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 0.2)
    assert grids(figure)[0] == [[0.01, 0.01], [0.01, 0.01]]
    blank, full = grids(figure)[1]
    assert full == [0.2, 0.2]
    assert all(value is None or math.isnan(value) for value in blank)
    assert bar.get_ylabel() == "relative change of scales or weights"


def test_long_titles_stay_above_their_panel(drawn, tmp_path):
    rows = [change(0, module, 0.1) for module in MODULES]
    plot_layer_changes(
        rows, tmp_path / "two.png", other=rows, titles=("a-run-with-all-its-$\\settings$-in-its-name", "b")
    )
    (figure,) = drawn
    left, right, _ = (axes.title.get_window_extent() for axes in figure.axes)
    assert left.x0 >= 0
    assert left.x1 < right.x0


def test_absolute_changes_unless_all_are_relative(drawn, tmp_path):
    plot_layer_changes([change(0, MODULES[0], 0.5), change(0, MODULES[1], None)], tmp_path / "absolute.png")
    assert grids(drawn[0]) == [[[50, 100]]]
    assert drawn[0].axes[-1].get_ylabel() == "change of scales"


def test_nothing_moved(drawn, tmp_path):
    plot_layer_changes([change(0, module, 0.0) for module in MODULES], tmp_path / "zero.png")
    assert grids(drawn[0]) == [[[0, 0]]]


@pytest.mark.parametrize("other", [None, []])
def test_an_adapter_without_layers(tmp_path, other):
    rows = [] if other is None else [change(0, MODULES[0], 0.1)]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_layer_changes(rows, tmp_path / "changes.png", other=other)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        heat_map([[Panel("", {"a.0.b": 1.0})]])
