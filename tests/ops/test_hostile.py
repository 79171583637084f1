"""The Triton kernels on tensors that pass every check and still are extreme: on a GPU, or under Triton's interpreter.

`sanitize.py` runs this file and the other tests of the kernels under compute-sanitizer.
"""

import math

import gptq_models
import pytest
import torch
from gptq_models import BITS, random_packed

from peft_quant.ops import EncodedWeight
from peft_quant.ops.int8 import eager as int8
from peft_quant.ops.int8 import triton as int8_kernels
from peft_quant.ops.packed import eager
from peft_quant.ops.packed import triton as kernels


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXTREMES = (math.nan, math.inf, -math.inf, 65504.0, -65504.0, 2.0**-24, -(2.0**-24))  # fp16: largest, smallest
# one unit row of 32 weights; a column tile and a half; rows beyond a tile that are no power of two
SIZES = ((32, 32), (32, 192), (416, 96))


def on(device, operand):
    return type(operand)(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in operand))


def hostile(bits, layout="grouped", rows=96, columns=96, fill=None):
    """A weight whose codes and zero points are random bits, or all `fill`."""
    weight = random_packed(bits, rows, columns, **{"symmetric": False, **gptq_models.LAYOUTS[layout]}).operand()
    generator = torch.Generator().manual_seed(bits)

    def words(like):
        if fill is not None:
            return torch.full_like(like, fill)
        return torch.randint(-(2**31), 2**31, like.shape, dtype=torch.int32, generator=generator)

    return weight._replace(qweight=words(weight.qweight), qzeros=words(weight.qzeros))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fill", (None, 0, -1))
@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize("layout", ("grouped", "act-order", "per channel"))
@pytest.mark.parametrize("bits", BITS)
def test_any_bits_are_codes_and_zero_points(bits, layout, zero_offset, fill):
    weight = hostile(bits, layout, fill=fill)._replace(zero_offset=zero_offset)
    assert_equal(kernels.dequantize(on(DEVICE, weight), torch.float32), eager.dequantize(weight, torch.float32))


@pytest.mark.parametrize("layout", ("grouped", "act-order"))
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_odd_sizes(bits, rows, columns, layout):
    weight = hostile(bits, layout, rows, columns)
    assert_equal(kernels.dequantize(on(DEVICE, weight), torch.float32), eager.dequantize(weight, torch.float32))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("layout", ("grouped", "act-order"))
def test_an_extreme_scale_stays_in_its_group_and_column(layout, extreme):
    weight = hostile(4, layout)
    weight.scales[1, 5] = extreme
    assert_equal(kernels.dequantize(on(DEVICE, weight), torch.float32), eager.dequantize(weight, torch.float32))


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_reaches_only_its_token(bits, monkeypatch):
    monkeypatch.setattr(kernels, "_FEW_TOKENS_BITS", BITS)
    monkeypatch.setattr(kernels, "_FEW_TOKENS_WEIGHTS", 0)
    weight = on(DEVICE, hostile(bits))
    x = torch.ones(3, 96, device=DEVICE)
    x[1, 7], x[1, 8] = math.nan, math.inf
    y = kernels.linear(x, weight)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("tokens", (0, 1, 33))
@pytest.mark.parametrize("bits", BITS)
def test_views_and_no_tokens(bits, tokens, monkeypatch):
    """Tokens that are not contiguous and begin at an odd address."""
    monkeypatch.setattr(kernels, "_FEW_TOKENS_BITS", BITS)
    monkeypatch.setattr(kernels, "_FEW_TOKENS_WEIGHTS", 0)
    weight = hostile(bits)._replace(scales=torch.full((3, 96), 2.0**-10, dtype=torch.float16))
    x, dy = (torch.ones(tokens, 2 * 96 + 1)[:, 1::2] for _ in range(2))
    here = on(DEVICE, weight)
    moved_x, moved_dy = (torch.ones(tokens, 2 * 96 + 1, device=DEVICE)[:, 1::2] for _ in range(2))
    # sums of at most 96 multiples of 2**-10 are exact in fp32
    assert_equal(kernels.linear(moved_x, here), eager.linear(x, weight))
    assert_equal(kernels.linear_grad_x(moved_dy, here), eager.linear_grad_x(dy, weight))
    scales = kernels.linear_grad_scales(moved_x, moved_dy, *here[:2], *here[3:])
    assert_equal(scales, eager.linear_grad_scales(x, dy, *weight[:2], *weight[3:]))


@pytest.mark.parametrize("columns", (1, 2, 96))
def test_codes_of_outliers_at_both_ends_of_a_row(columns):
    """One outlier per row, at its first or last column, up to all columns outliers."""
    width = 96
    codes = torch.full((5, width), -128, dtype=torch.int8)
    at = torch.tensor([0, width - 1]) if columns == 2 else torch.arange(columns) + (width - columns)
    outliers = at.to(torch.int16).repeat(5, 1)
    weight = EncodedWeight(codes, torch.full((5, 1), -(2.0**-100)), outliers, torch.full((5, columns), 3e38))
    assert_equal(
        int8_kernels.decode_weight(on(DEVICE, weight), torch.float32), int8.decode_weight(weight, torch.float32)
    )


@pytest.mark.parametrize("elements", (1, 255, 257, 4097))
def test_any_number_of_elements_is_encoded(elements):
    x = torch.full((elements,), 3e38)
    expected = int8.encode_gradient(x * 2.0**-70, 5)
    actual = int8_kernels.encode_gradient((x * 2.0**-70).to(DEVICE), 5)
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1])
    overflown = int8_kernels.encode_gradient(x.to(DEVICE), 5)
    assert not overflown[1].isfinite().any()
    assert not overflown[2].isfinite().any()
