import pytest
from gptq_models import PlainLayer, random_packed

from peft_quant import gptq
from peft_quant.gptq.fingerprint import fingerprint, layer_digest


def digest(zero_offset=1, spoil=None, **options):
    layer = PlainLayer(random_packed(4, group_size=32, zero_offset=zero_offset, **options))
    if spoil:
        getattr(layer, spoil).view(-1)[0] += 1
    return layer_digest(gptq.packed_tensors(layer), 4, zero_offset)


def test_does_not_depend_on_the_zero_format():
    assert digest(zero_offset=0) == digest(zero_offset=1)


@pytest.mark.parametrize("spoil", gptq.PackedTensors._fields)
def test_depends_on_every_tensor(spoil):
    assert digest() != digest(spoil=spoil)


def test_depends_on_the_weight():
    assert digest() != digest(seed=1)


def test_order_of_layers_does_not_matter():
    first, second = digest(), digest(seed=1)
    assert fingerprint([first, second]) == fingerprint([second, first]) != fingerprint([first])


def test_tensors_smaller_than_the_sample():
    tensors = gptq.packed_tensors(PlainLayer(random_packed(4, rows=32, columns=32)))
    assert tensors.scales.numel() < 256
    assert layer_digest(tensors, 4, 1) != layer_digest(tensors._replace(scales=tensors.scales * 2), 4, 1)
