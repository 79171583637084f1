import pytest
import torch
from gptq_models import PlainLayer, random_packed

from peft_quant import InvalidCheckpointError, gptq


def spoil_g_idx(value):
    def spoil(layer):
        layer.g_idx[7] = value

    return spoil


def spoil_scale(value):
    def spoil(layer):
        layer.scales[1, 3] = value

    return spoil


def replace(name, function):
    def spoil(layer):
        setattr(layer, name, function(getattr(layer, name)))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    (
        (spoil_g_idx(3), r"g_idx ranges over 0\.\.3, but there are 3 groups"),
        (spoil_g_idx(-1), r"g_idx ranges over -1\.\.2"),
        (replace("g_idx", torch.zeros_like), "uses 1 of the 3 groups"),
        (replace("g_idx", lambda t: t[:-1]), "not 2, 3, 4 or 8 bits"),
        (replace("g_idx", lambda t: t.float()), "dtype torch.float32"),
        (spoil_scale(float("nan")), "1 of 192 scales are NaN or infinite"),
        (spoil_scale(float("inf")), "1 of 192 scales are NaN or infinite"),
        (spoil_scale(float("-inf")), "1 of 192 scales are NaN or infinite"),
        (spoil_scale(0.0), "1 of 192 scales are zero"),
        (spoil_scale(-0.0), "1 of 192 scales are zero"),
        (replace("scales", lambda t: t[:, :-1]), "expected 64 columns"),
        (replace("scales", lambda t: t.int()), "scales have dtype torch.int32"),
        (replace("qzeros", lambda t: t[:-1]), r"qzeros have shape \(2, 8\), expected \(3"),
        (replace("qweight", lambda t: t[:-1]), "not 2, 3, 4 or 8 bits"),
        (replace("qweight", lambda t: t.to(torch.uint8)), "qweight has dtype torch.uint8"),
        (replace("qweight", torch.flatten), r"qweight has shape \(768,\), not 2 dimensions"),
    ),
)
def test_damaged_layers_are_refused_by_name(spoil, message):
    layer = PlainLayer(random_packed(4, group_size=32))
    spoil(layer)
    with pytest.raises(InvalidCheckpointError, match=message) as error:
        gptq.read_format(layer, "model.layers.3.mlp.up_proj")
    assert "model.layers.3.mlp.up_proj (PlainLayer) is not a valid GPTQ layer" in str(error.value)
    assert "download it again" in str(error.value)


def test_scales_may_be_negative():
    layer = PlainLayer(random_packed(4, group_size=32))
    layer.scales[1].neg_()
    assert gptq.read_format(layer).groups == 3
