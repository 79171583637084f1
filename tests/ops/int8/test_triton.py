"""The int8 kernels against plain PyTorch, to the bit: on a GPU, or under Triton's interpreter."""

import itertools
import math

import pytest
import torch

from peft_quant.ops import EncodedWeight, LionStep, random_key
from peft_quant.ops.int8 import eager as int8
from peft_quant.ops.int8 import triton as kernels


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a piece of a block; blocks across rows; a row a block; whole programs
SHAPES = ((5, 7), (7, 130), (3, 256), (16, 1024))
KEY = random_key(3, 1, 4)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Output buffers begin as NaN or as integers of their own, so that an element no program writes is seen."""
    empty, numbers = torch.empty, itertools.count()

    def filled(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else next(numbers) % 128)

    monkeypatch.setattr(torch, "empty", filled)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, dtype):
    x, y = random(*shape).to(dtype), random(*shape, seed=1).to(dtype)
    *expected, squares = int8.encode_gradient(x, KEY)
    *actual, squares_here = kernels.encode_gradient(x.to(DEVICE), KEY)
    assert_same(actual, expected)
    torch.testing.assert_close(squares_here.cpu(), squares)  # summed in another order
    squares = int8.accumulate_gradient(*expected, y, -KEY)
    squares_here = kernels.accumulate_gradient(*actual, y.to(DEVICE), -KEY)
    assert_same(actual, expected)
    torch.testing.assert_close(squares_here.cpu(), squares)


def test_gradients_of_zeros_and_of_what_is_not_finite():
    x = random(5, 256)
    x[0] = 0
    x[1] = 1e-35
    x[2, 7], x[3, 7] = math.nan, math.inf
    codes, scales, squares = (t.cpu() for t in kernels.encode_gradient(x.to(DEVICE), KEY))
    expected, expected_scales, _ = int8.encode_gradient(x, KEY)
    finite = torch.tensor([0, 1, 4])
    assert torch.equal(codes[finite], expected[finite])
    assert torch.equal(scales[finite], expected_scales[finite])
    assert scales[[2, 3]].isnan().all()
    assert not squares[[2, 3]].isfinite().any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("outliers", (0, 1, 5))
@pytest.mark.parametrize("shape", ((3, 6), (7, 130), (3, 1024), (2, 9000)))
def test_decoding(shape, outliers, groups, dtype):
    parts = int8.encode_weight(random(*shape), outliers, groups)
    parts[0].add_(1)
    parts[1][::2] *= -1
    expected = int8.decode_weight(parts, dtype)
    actual = kernels.decode_weight(EncodedWeight(*moved(parts)), dtype)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates to bf16, the GPU rounds
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        assert_same([actual], [expected])


def lion(path, device, shape, dtype, groups, quantized, rounding, norm, signed=False):
    weight, scales = (random(*shape) * 0.02).to(dtype), None
    if dtype == torch.int8:
        weight, scales, *_ = int8.encode_weight(random(*shape) * 0.02, 0, groups)
        if signed:
            scales[::2] *= -1
    gradient, gradient_scales = random(*shape, seed=1).to(dtype if dtype.is_floating_point else torch.float16), None
    if quantized:
        gradient, gradient_scales, _ = int8.encode_gradient(gradient, 1)
    momentum, momentum_scales, _ = int8.encode_gradient(random(*shape, seed=2), 2)
    residual = int8.random_residual(weight, 5) if rounding == int8.ERROR_FEEDBACK else None
    tensors = weight, scales, gradient, gradient_scales, momentum, momentum_scales, residual
    tensors = [t if t is None else t.to(device) for t in tensors]
    norm, skipped = torch.tensor(norm, device=device), torch.tensor(0, dtype=torch.int32, device=device)
    for step in range(3):
        options = (1.0, 1e-4, 0.9, 0.99, 0.1, rounding, random_key(7, step))
        path.lion_step(LionStep(*tensors, norm, skipped, *options))
    return [*tensors, skipped]


@pytest.mark.parametrize("norm", (0.5, 3.0, math.nan, math.inf))
@pytest.mark.parametrize("rounding", (int8.STOCHASTIC, int8.NEAREST, int8.ERROR_FEEDBACK))
@pytest.mark.parametrize("quantized", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_lion(shape, quantized, rounding, norm):
    arguments = shape, torch.int8, 1, quantized, rounding, norm
    assert_same(lion(kernels, DEVICE, *arguments), lion(int8, "cpu", *arguments))


@pytest.mark.parametrize("rounding", (int8.STOCHASTIC, int8.NEAREST, int8.ERROR_FEEDBACK))
@pytest.mark.parametrize("groups", (1, 32))
def test_lion_on_negative_scales(groups, rounding):
    arguments = (16, 1024), torch.int8, groups, True, rounding, 1.0, True
    assert_same(lion(kernels, DEVICE, *arguments), lion(int8, "cpu", *arguments))


@pytest.mark.parametrize("groups", (2, 4, 32))
def test_lion_on_groups(groups):
    arguments = (16, 1024), torch.int8, groups, True, int8.STOCHASTIC, 1.0
    assert_same(lion(kernels, DEVICE, *arguments), lion(int8, "cpu", *arguments))


@pytest.mark.parametrize("rounding", (int8.STOCHASTIC, int8.NEAREST))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES)
def test_lion_on_floating_point_weights(shape, dtype, rounding):
    if dtype == torch.bfloat16 and rounding == int8.NEAREST and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates to bf16")
    arguments = shape, dtype, 1, False, rounding, 3.0
    assert_same(lion(kernels, DEVICE, *arguments), lion(int8, "cpu", *arguments))


@pytest.mark.parametrize("bias", (None, 48))
def test_products(bias):
    parts = int8.encode_weight(random(48, 70), 2)
    weight = EncodedWeight(*moved(parts))
    x, dy = random(2, 5, 70, seed=1), random(2, 5, 48, seed=2)
    bias = None if bias is None else random(bias, seed=3)
    y = kernels.int8_linear(x.to(DEVICE), weight, *moved([bias]))
    # sums of 70 products in another order
    torch.testing.assert_close(y.cpu(), int8.int8_linear(x, parts, bias), rtol=1e-5, atol=1e-4)
    dx = kernels.int8_linear_grad_x(dy.to(DEVICE), weight)
    torch.testing.assert_close(dx.cpu(), int8.int8_linear_grad_x(dy, parts), rtol=1e-5, atol=1e-4)
