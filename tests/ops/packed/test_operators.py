"""Every operator against the naive reference: outputs and gradients, at odd sizes."""

import pytest
import torch
from gptq_models import BITS, LAYOUTS, kept_for_backward, random_packed

from peft_quant import ops
from peft_quant.ops import reference
from peft_quant.ops.packed import eager


def arguments(bits, layout="grouped", zero_offset=1, **sizes):
    packed = random_packed(bits, zero_offset=zero_offset, **sizes, **{"symmetric": False, **LAYOUTS[layout]})
    weight = packed.operand()
    return packed, weight._replace(scales=weight.scales.float())


@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact(bits, layout, zero_offset):
    packed, weight = arguments(bits, layout, zero_offset)
    dense = ops.dequantize(weight, torch.float32)
    assert torch.equal(dense, packed.weight)
    assert torch.equal(dense, reference.dequantize(*weight[:3], packed.tensors["g_idx"], bits, zero_offset))


@pytest.mark.parametrize("layout", ("per channel", "grouped", "ragged", "act-order"))
def test_dequantize_in_blocks_smaller_than_the_weight(layout, monkeypatch):
    monkeypatch.setattr(eager, "_DECODE_BLOCK_ELEMENTS", 32 * 64)
    packed, weight = arguments(4, layout, rows=224)
    assert torch.equal(ops.dequantize(weight, torch.float32), packed.weight)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dequantize_rounds_the_fp32_weight_once(dtype):
    packed, weight = arguments(4)
    assert torch.equal(ops.dequantize(weight, dtype), packed.weight.to(dtype))


@pytest.mark.parametrize("tokens", (1, 7, 33))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_linear_and_its_gradients(bits, layout, tokens, monkeypatch):
    monkeypatch.setattr(eager, "_GRADIENT_BLOCK_ROWS", 64)
    packed, weight = arguments(bits, layout)
    g_idx, scales = packed.tensors["g_idx"], weight.scales.requires_grad_()
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 96, generator=generator).requires_grad_()
    dy = torch.randn(tokens, 64, generator=generator)

    y = ops.linear(x, weight)
    y.backward(dy)

    centered = reference.centered_codes(weight.qweight, weight.qzeros, g_idx, bits, 1)
    # fp32 sums of at most 96 products in another order: a few units in the last place of the largest
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, reference.linear(x, packed.weight), **close)
    torch.testing.assert_close(x.grad, reference.linear_grad_x(dy, packed.weight), **close)
    expected = reference.linear_grad_scales(x, dy, centered, g_idx, scales.shape[0])
    torch.testing.assert_close(scales.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("tokens", (1, 33))
@pytest.mark.parametrize("bits", BITS)
def test_autocast_is_left_to_the_model(bits, tokens):
    _, weight = arguments(bits)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(0))
    expected = ops.linear(x, weight)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(ops.linear(x, weight), expected)


def lora_factors(rank=4):
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((rank, 96), (64, rank)))


@pytest.mark.parametrize("layout", ("per channel", "grouped", "act-order", "signed"))
@pytest.mark.parametrize("bits", BITS)
def test_lora_linear_and_its_gradients(bits, layout):
    packed, weight = arguments(bits, layout)
    a, b = lora_factors()
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    y = ops.lora_linear(x, a, b, 0.5, weight)
    expected = x @ (packed.weight + 0.5 * a.t() @ b.t())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for actual, gradient in zip(torch.autograd.grad(y, (x, a, b), dy), torch.autograd.grad(expected, (x, a, b), dy)):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_lora_linear_in_16_bits(dtype):
    packed, weight = arguments(4)
    a, b = lora_factors()
    x = torch.randn(9, 96, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = ops.lora_linear(x, a, b, 0.5, weight)
    assert y.dtype == dtype
    y.sum().backward()
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (dtype, torch.float32, torch.float32)
    # four roundings to the dtype on the way: of the factors, of `x @ A^T`, of the branch and of the sum
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.float(), x.float() @ (packed.weight + 0.5 * a.t() @ b.t()), **close)


def test_lora_linear_keeps_what_its_gradients_need():
    _, weight = arguments(4)
    a, b = lora_factors()
    x = torch.randn(9, 96, requires_grad=True)

    def kept(*frozen):
        for factor in (a, b):
            factor.requires_grad_(not any(factor is other for other in frozen))
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            ops.lora_linear(x, a, b, 0.5, weight)
        return {shape for shape in shapes if shape[0] == 9}

    assert kept() == {(9, 96), (9, 4)}
    assert kept(a, b) == set()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_activations_lose_only_their_own_rounding(dtype):
    packed, weight = arguments(4)
    x = torch.randn(9, 96, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight.scales.requires_grad_()
    y = ops.linear(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference.linear(x, packed.weight).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert weight.scales.grad.dtype == torch.float32


def test_leading_dimensions_are_tokens():
    packed, weight = arguments(4)
    x = torch.randn(2, 3, 96)
    y = ops.linear(x, weight)
    assert y.shape == (2, 3, 64)
    torch.testing.assert_close(y, x @ packed.weight)


@pytest.mark.parametrize("tokens", (2, 20))
def test_what_follows_may_write_to_the_output(tokens):
    _, weight = arguments(4)
    a = torch.randn(4, weight.rows, requires_grad=True)
    b = torch.randn(weight.columns, 4, requires_grad=True)
    x = torch.randn(1, tokens, a.shape[1], requires_grad=True)
    for product in (
        lambda: ops.linear(x, weight),
        lambda: ops.lora_linear(x, a, b, 0.5, weight),
    ):
        written = product()
        written += x.sum()
        (grad,) = torch.autograd.grad(written.sum(), x)
        (expected,) = torch.autograd.grad((product() + x.sum()).sum(), x)
        assert torch.equal(grad, expected)


def test_gradients_agree_with_finite_differences():
    _, weight = arguments(4, rows=64, columns=32)
    x = torch.randn(3, 64)
    scales = weight.scales.requires_grad_()
    dy = torch.randn(3, 32)
    (ops.linear(x, weight) * dy).sum().backward()
    step = torch.zeros_like(scales)
    step[1, 5] = 1e-2
    with torch.no_grad():
        up, down = (ops.linear(x, weight._replace(scales=scales + s)) for s in (step, -step))
    torch.testing.assert_close(scales.grad[1, 5], ((up - down) * dy).sum() / 2e-2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ("per channel", "grouped", "act-order"))
@pytest.mark.parametrize("bits", (3, 4))
def test_opcheck(bits, layout):
    _, weight = arguments(bits, layout)
    x = torch.randn(5, 96)
    dy = torch.randn(5, 64)
    operators = torch.ops.peft_quant
    with torch._dynamo.config.patch(disable=False):
        torch.library.opcheck(operators.dequantize.default, (*weight, torch.float32))
        torch.library.opcheck(operators.linear.default, (x, *weight))
        torch.library.opcheck(operators.linear_grad_x.default, (dy, *weight))
        torch.library.opcheck(operators.linear_grad_scales.default, (x, dy, *weight[:2], *weight[3:]))


@pytest.mark.parametrize("layout", ("per channel", "grouped"))
def test_compiles_without_graph_breaks(layout):
    _, weight = arguments(4, layout)

    def loss(x, scales):
        y = ops.linear(torch.relu(x), weight._replace(scales=scales * 1.0))
        return (y * y).sum()

    def gradients(function):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
        trained = weight.scales.clone().requires_grad_()
        function(x, trained).backward()
        return x.grad, trained.grad

    with torch._dynamo.config.patch(disable=False):
        compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, gradients(loss)):
        torch.testing.assert_close(actual, expected)


def test_lora_linear_compiles_without_graph_breaks():
    _, weight = arguments(4)

    def loss(x, a, b):
        return ops.lora_linear(torch.relu(x), a, b, 0.5, weight).square().sum()

    def gradients(function):
        leaves = (torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_(), *lora_factors())
        return torch.autograd.grad(function(*leaves), leaves)

    with torch._dynamo.config.patch(disable=False):
        compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, gradients(loss)):
        torch.testing.assert_close(actual, expected)


class TestSavedForBackward:
    """Bytes that autograd keeps between forward and backward."""

    rows, columns, tokens = 512, 256, 8

    def saved(self, function, *inputs):
        return kept_for_backward(lambda: function(*inputs))

    def layer(self, layout="grouped"):
        return arguments(4, layout, rows=self.rows, columns=self.columns)

    @pytest.mark.parametrize("layout", ("per channel", "grouped", "act-order"))
    def test_only_packed_tensors_without_a_scale_gradient(self, layout):
        _, weight = self.layer(layout)
        x = torch.randn(self.tokens, self.rows).requires_grad_()
        kept = self.saved(lambda: ops.linear(x, weight))
        assert kept.keys() == {tensor.untyped_storage().data_ptr() for tensor in weight[:4] if tensor is not None}

    def test_x_besides_with_a_scale_gradient(self):
        _, weight = self.layer()
        weight.scales.requires_grad_()
        x = torch.randn(self.tokens, self.rows).requires_grad_()
        kept = self.saved(lambda: ops.linear(x, weight))
        assert kept.keys() == {tensor.untyped_storage().data_ptr() for tensor in (*weight[:3], x)}

    def test_the_output_in_place_of_x_with_one_group(self):
        _, weight = self.layer("per channel")
        weight.scales.requires_grad_()
        x = torch.randn(self.tokens, self.rows).requires_grad_()
        kept = self.saved(lambda: ops.linear(x, weight))
        packed_bytes = sum(tensor.untyped_storage().nbytes() for tensor in weight[:3])
        assert sum(kept.values()) == packed_bytes + self.tokens * self.columns * 4

    def test_no_dense_gradient_of_the_weight_is_formed(self, monkeypatch):
        monkeypatch.setattr(eager, "_GRADIENT_BLOCK_ROWS", 64)
        shapes = []
        matmul = torch.Tensor.__matmul__
        monkeypatch.setattr(
            torch.Tensor, "__matmul__", lambda a, b: shapes.append((a.shape[0], b.shape[1])) or matmul(a, b)
        )
        _, weight = self.layer()
        x, dy = torch.randn(self.tokens, self.rows), torch.randn(self.tokens, self.columns)
        eager.linear_grad_scales(x, dy, *weight[:2], *weight[3:])
        assert shapes == [(64, self.columns)] * (self.rows // 64)
