"""The product of few tokens on the CPU, and the table it keeps beside a `qweight`."""

import copy
import gc
import io
import weakref

import pytest
import torch
from gptq_models import PlainLayer, random_packed

from peft_quant import gptq, ops
from peft_quant.ops import PackedWeight
from peft_quant.ops.packed import eager, few_tokens


pytestmark = pytest.mark.skipif(not few_tokens._HAS_KERNEL, reason="PyTorch was built without fbgemm")

LAYOUTS = {
    "per channel": {"group_size": -1},
    "32": {"group_size": 32},
    "64": {"group_size": 64},
    "128": {"group_size": 128},
    "ragged": {"group_size": 96},
    "small odd groups": {"group_size": 24},
    "act-order": {"group_size": 32, "act_order": True},
    "ragged act-order": {"group_size": 96, "act_order": True},
    "signed per channel": {"group_size": -1, "signed": True},
    "signed": {"group_size": 32, "signed": True},
    "signed, symmetric, act-order": {"group_size": 32, "act_order": True, "symmetric": True, "signed": True},
}


def arguments(bits, layout="64", zero_offset=1, rows=256, columns=96, symmetric=False, **options):
    options = {"symmetric": symmetric, **LAYOUTS[layout], **options}
    packed = random_packed(bits, rows, columns, zero_offset=zero_offset, **options)
    weight = packed.operand()
    return packed, weight._replace(scales=weight.scales.float())


def tokens(count, features=256, dtype=torch.float32):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(count)).to(dtype)


def close_to(y, x, weight):
    # fp32 sums of K products of either sign, in another order
    expected = x.double() @ weight.double()
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=2**-20 * (x.abs().double() @ weight.abs().double()).max()
    )


@pytest.fixture
def made(monkeypatch):
    """The tables that are made, one entry each."""
    calls = []
    make = few_tokens._make_product
    monkeypatch.setattr(few_tokens, "_make_product", lambda *args: calls.append(args) or make(*args))
    return calls


@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_every_layout(bits, layout, zero_offset, made):
    packed, weight = arguments(bits, layout, zero_offset)
    for count in (1, few_tokens._MAX_TOKENS):
        x = tokens(count)
        close_to(ops.linear(x, weight), x, packed.weight)
    assert len(made) == 1


@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("symmetric", (True, False))
def test_8_bits(symmetric, signed, zero_offset):
    packed, weight = arguments(8, zero_offset=zero_offset, symmetric=symmetric, signed=signed)
    x = tokens(2)
    assert (few_tokens.linear(x, weight) is None) == (not symmetric)
    close_to(ops.linear(x, weight), x, packed.weight)


@pytest.mark.parametrize(("rows", "columns"), ((32, 32), (96, 64), (160, 224), (1056, 32)))
def test_sizes(rows, columns, made):
    packed, weight = arguments(4, "32", rows=rows, columns=columns)
    x = tokens(1, rows)
    close_to(ops.linear(x, weight), x, packed.weight)
    assert len(made) == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_tokens_lose_only_the_rounding_of_the_output(dtype):
    packed, weight = arguments(4)
    x = tokens(3, dtype=dtype)
    y = ops.linear(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y, (x.double() @ packed.weight.double()).to(dtype))


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("group_size", (32, 64, 128, 256))
def test_4_bits_in_bfloat16(group_size, signed, made):
    packed = random_packed(4, 512, 96, group_size=group_size, symmetric=True, zero_offset=1, signed=signed)
    weight = packed.operand()
    x = tokens(3, 512, torch.bfloat16)
    for factor in (1.0, 0.5):
        y = ops.linear(x, weight._replace(scales=weight.scales.float() * factor))
        assert y.dtype == torch.bfloat16
        # scales, weights and the output are rounded to 8 bits of precision
        limit = 3 * 2**-8 * factor * (x.abs().double() @ packed.weight.abs().double()).max()
        torch.testing.assert_close(y.double(), x.double() @ packed.weight.double() * factor, rtol=0, atol=limit)
    assert len(made) == 1


def test_written_scales_are_seen_in_bfloat16():
    weight = random_packed(4, 512, 96, group_size=64, symmetric=True, zero_offset=1).operand()
    x, scales = tokens(1, 512, torch.bfloat16), weight.scales.float()
    first, second = (ops.linear(x, weight._replace(scales=scales.mul_(2))) for _ in range(2))
    assert torch.equal(second, 2 * first)


def test_leading_dimensions_and_no_tokens():
    packed, weight = arguments(4)
    x = tokens(6).view(2, 3, 256)
    close_to(ops.linear(x, weight).view(6, 96), x.view(6, 256), packed.weight)
    assert ops.linear(x[:, :0], weight).shape == (2, 0, 96)


def test_more_tokens_make_no_table(made):
    _, weight = arguments(4)
    ops.linear(tokens(few_tokens._MAX_TOKENS + 1), weight)
    assert not made


def test_gradients_and_their_absence_make_no_difference():
    """A trained adapter's logits with gradients are the merged model's without."""
    _, weight = arguments(4)
    x = tokens(1)
    frozen = ops.linear(x, weight._replace(scales=weight.scales.half()))
    trained = ops.linear(x.requires_grad_(), weight._replace(scales=weight.scales.clone().requires_grad_()))
    assert torch.equal(trained, frozen)


def test_scales_may_change_between_calls(made):
    packed, weight = arguments(4)
    x = tokens(1)
    for factor in (1.0, 0.5, -3.0):
        close_to(ops.linear(x, weight._replace(scales=weight.scales * factor)), x, packed.weight * factor)
    assert len(made) == 1


@pytest.mark.parametrize("change", ("written to", "given other data"))
@pytest.mark.parametrize("position", (0, 1), ids=("qweight", "qzeros"))
def test_a_changed_tensor_is_seen(change, position, made):
    _, weight = arguments(4)
    x = tokens(1)
    ops.linear(x, weight)
    tensor = weight[position]
    new = tensor.flip(1)
    if change == "written to":
        tensor.copy_(new)
    else:
        tensor.data = new
    close_to(ops.linear(x, weight), x, eager.dequantize(weight, torch.float32))
    assert len(made) == 2


def test_changed_g_idx_is_seen():
    _, weight = arguments(4, "act-order")
    x = tokens(1)
    ops.linear(x, weight)
    weight.g_idx.copy_(weight.g_idx.flip(0))
    close_to(ops.linear(x, weight), x, eager.dequantize(weight, torch.float32))


def test_tensors_of_inference_mode_are_decoded(made):
    packed, weight = arguments(4)
    x = tokens(1)
    with torch.inference_mode():
        inference = PackedWeight(*(t.clone() if isinstance(t, torch.Tensor) else t for t in weight))
        close_to(ops.linear(x, inference), x, packed.weight)
        assert not made
        close_to(ops.linear(x, weight), x, packed.weight)
        assert len(made) == 1


def test_the_table_is_no_part_of_the_layer_and_dies_with_it():
    layer = PlainLayer(random_packed(4, 256, 96, group_size=64))
    read = gptq.read_format(layer)
    keys = layer.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    size = buffer.tell()
    x = tokens(1)
    y = gptq.linear(layer, read, x)

    table = weakref.ref(few_tokens._tables[layer.qweight].product)
    assert layer.state_dict().keys() == keys
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    assert buffer.tell() == size
    other = copy.deepcopy(layer)
    assert other.qweight not in few_tokens._tables
    assert torch.equal(gptq.linear(other, read, x), y)

    del layer
    gc.collect()
    assert table() is None
    assert other.qweight in few_tokens._tables


def test_compiles_without_graph_breaks_and_with_one_table(made):
    layer = PlainLayer(random_packed(4, 256, 96, group_size=64))
    read = gptq.read_format(layer)
    x = tokens(1)
    with torch._dynamo.config.patch(disable=False), torch.no_grad():
        compiled = torch.compile(lambda x: gptq.linear(layer, read, x), fullgraph=True, backend="aot_eager")
        results = [compiled(x) for _ in range(3)]
    assert all(torch.equal(y, gptq.linear(layer, read, x)) for y in results)
    assert len(made) == 1
