import sys
from types import SimpleNamespace

import pytest

from peft_quant import plot_layer_errors
from peft_quant.module_names import split_block


def row(name, activation=True):
    return SimpleNamespace(
        name=name,
        weight_error_before=0.2,
        weight_error_after=0.1,
        activation_error_before=0.3 if activation else None,
        activation_error_after=0.2 if activation else None,
    )


@pytest.fixture
def size():
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    return lambda path: imread(path).shape[:2]


def test_a_panel_a_kind_of_error(tmp_path, size):
    names = [f"model.layers.{block}.{module}" for block in range(12) for module in ("self_attn.q_proj", "mlp.up_proj")]
    both = plot_layer_errors([row(name) for name in names], tmp_path / "both.png")
    weights = plot_layer_errors([row(name, activation=False) for name in names], tmp_path / "weights.png")
    assert both == tmp_path / "both.png"
    assert both.read_bytes().startswith(b"\x89PNG")
    assert size(both)[0] == 2 * size(weights)[0]


def test_layers_of_several_lists_or_none(tmp_path, size):
    names = ["encoder.block.0.wi", "decoder.block.0.wi", "decoder.block.10.experts.3.wi", "lm_head"]
    plot_layer_errors((row(name) for name in names), tmp_path / "errors.png")
    assert len({split_block(name) for name in names}) == len(names)


def test_an_empty_report(tmp_path):
    with pytest.raises(ValueError, match="no layers"):
        plot_layer_errors([], tmp_path / "errors.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_layer_errors([row("a.0.b")], tmp_path / "errors.png")
