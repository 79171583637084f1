"""The Triton kernels against the naive reference: on a GPU, or under Triton's interpreter."""

import gptq_models
import pytest
import torch
from gptq_models import BITS, random_packed

from peft_quant.ops import reference
from peft_quant.ops.packed import triton as kernels


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {**gptq_models.LAYOUTS, "groups smaller than a unit": {"group_size": 4}}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Output buffers begin as NaN, so that an element no program writes is seen."""
    empty = torch.empty

    def nan(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


def arguments(bits, layout, zero_offset, rows=96, columns=96):
    options = {"symmetric": False, **LAYOUTS[layout]}
    packed = random_packed(bits, rows, columns, zero_offset=zero_offset, **options)
    return packed, packed.operand(DEVICE)


@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact(bits, layout, zero_offset):
    packed, weight = arguments(bits, layout, zero_offset)
    assert torch.equal(kernels.dequantize(weight, torch.float32).cpu(), packed.weight)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("rows", "columns"), ((32, 32), (160, 224)))
def test_sizes_and_dtypes(dtype, rows, columns):
    packed, weight = arguments(4, "grouped", 1, rows, columns)
    dense = kernels.dequantize(weight._replace(scales=weight.scales.float()), dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates to bf16, the GPU rounds
        torch.testing.assert_close(dense.cpu(), packed.weight.to(dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(dense.cpu(), packed.weight.to(dtype))


@pytest.mark.parametrize("tokens", (1, 70))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_scale_gradient(bits, layout, tokens, monkeypatch):
    monkeypatch.setattr(kernels, "_PRODUCT_ROWS", 64)
    packed, weight = arguments(bits, layout, 1)
    generator = torch.Generator().manual_seed(tokens)
    x, dy = (torch.randn(tokens, 96, generator=generator) for _ in range(2))
    actual = kernels.linear_grad_scales(x.to(DEVICE), dy.to(DEVICE), *weight[:2], *weight[3:])
    tensors = packed.tensors
    centered = reference.centered_codes(tensors["qweight"], tensors["qzeros"], tensors["g_idx"], bits, 1)
    expected = reference.linear_grad_scales(x, dy, centered, tensors["g_idx"], tensors["scales"].shape[0])
    # fp32 products summed in another order
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("tokens", (1, 17))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_few_tokens(bits, layout, tokens, monkeypatch):
    monkeypatch.setattr(kernels, "_FEW_TOKENS_BITS", BITS)
    monkeypatch.setattr(kernels, "_FEW_TOKENS_WEIGHTS", 0)
    packed, weight = arguments(bits, layout, 1, rows=288)
    x = torch.randn(tokens, 288, generator=torch.Generator().manual_seed(tokens))
    y = kernels.linear(x.to(DEVICE), weight)
    # fp32 sums of 288 products in another order
    torch.testing.assert_close(y.cpu(), reference.linear(x, packed.weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_few_tokens_in_16_bits(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_FEW_TOKENS_WEIGHTS", 0)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 product")
    packed, weight = arguments(4, "grouped", 1, columns=128)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = kernels.linear(x.to(DEVICE), weight)
    assert y.shape == (2, 3, 128)
    expected = reference.linear(x, packed.weight.to(dtype).float())
    torch.testing.assert_close(y.cpu(), expected.to(dtype), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_linear_and_gradient_of_x(dtype):
    packed, weight = arguments(4, "grouped", 1)
    x, dy = (torch.randn(40, 96, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    dense = packed.weight.to(dtype).float()
    # sums of 96 products, rounded to the dtype at the end; the interpreter truncates weights to bf16
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 3e-2}
    y = kernels.linear(x.to(DEVICE), weight)
    torch.testing.assert_close(y.cpu().float(), reference.linear(x, dense), **close)
    dx = kernels.linear_grad_x(dy.to(DEVICE), weight)
    torch.testing.assert_close(dx.cpu().float(), reference.linear_grad_x(dy, dense), **close)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("rank", (1, 16, 40))
@pytest.mark.parametrize("transposed", (False, True))
def test_add_product(dtype, rank, transposed):
    y, a = (torch.randn(70, size, device=DEVICE).to(dtype) for size in (150, rank))
    b = torch.randn(150, rank, device=DEVICE).to(dtype).t() if transposed else torch.randn(rank, 150).to(DEVICE, dtype)
    expected = y.double() + 0.5 * a.double() @ b.double()
    kernels.add_product_(y, a, b, 0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-10
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
