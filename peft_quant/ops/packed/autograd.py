"""The packed products with gradients. Both save the packed tensors and decode the weight again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

from ..dispatch import compute_dtype
from . import eager, operators
from .operators import PackedWeight


# positions among the inputs
_SCALES = 3
_LORA_A, _LORA_B = 1, 2


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`y = x @ W`: `[..., K]` -> `[..., N]` in the dtype of `x`; differentiable in `x` and `weight.scales`.

    The gradient of the scales has their dtype: pass fp32 scales to train them.
    """
    return _linear_in_graph(x, *weight)


def lora_linear(
    x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, weight: PackedWeight
) -> torch.Tensor:
    """`y = x @ W + scaling * (x @ A^T) @ B^T` (LoRA, Hu et al., 2021, arXiv 2106.09685) with `W` packed.

    `lora_a` is `[R, K]` and `lora_b` `[N, R]`, both floating point, for rank `R`; products are computed in the dtype
    of `x`. Differentiable in `x`, `lora_a` and `lora_b`.
    """
    return _lora_linear_in_graph(x, lora_a, lora_b, scaling, *weight)


# Dynamo would trace into the autograd Functions, and before PyTorch 2.13 checkpointing would not recompute them
@torch.compiler.allow_in_graph
def _linear_in_graph(x: torch.Tensor, *packed: Any) -> torch.Tensor:
    # the autograd Function takes a tenth of the time of generating a token on a CPU
    return (PackedLinearFunction.apply if torch.is_grad_enabled() else torch.ops.peft_quant.linear)(x, *packed)


@torch.compiler.allow_in_graph
def _lora_linear_in_graph(*arguments: Any) -> torch.Tensor:
    return PackedLoraLinearFunction.apply(*arguments)


class PackedLinearFunction(torch.autograd.Function):
    """`y = x @ W`, differentiable in `x` and `scales`.

    Saves `x` only if the scales need a gradient. With one group (`group_size=-1` in GPTQ's terms) it saves its output
    instead of `x`, because `dscales[n] = sum_m dy[m, n] * y[m, n] / scales[n]` then needs no matrix product.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *packed: Any) -> torch.Tensor:
        weight = PackedWeight(*packed)
        y = operators.linear(x, weight)
        saved = None
        if ctx.needs_input_grad[_SCALES]:
            saved = y if weight.scales.shape[0] == 1 else x
        qweight, qzeros, scales, g_idx, *ctx.layout = weight
        ctx.save_for_backward(saved, qweight, qzeros, scales, g_idx)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, qweight, qzeros, scales, g_idx = ctx.saved_tensors
        grad_x = grad_scales = None
        if ctx.needs_input_grad[0]:
            grad_x = operators.linear_grad_x(dy, PackedWeight(qweight, qzeros, scales, g_idx, *ctx.layout))
        if ctx.needs_input_grad[_SCALES]:
            if scales.shape[0] == 1:
                products = (dy.float() * saved.float()).reshape(-1, dy.shape[-1])
                grad_scales = products.sum(0, keepdim=True) / scales
            else:
                grad_scales = operators.linear_grad_scales(saved, dy, qweight, qzeros, g_idx, *ctx.layout)
            grad_scales = grad_scales.to(scales.dtype)
        return grad_x, None, None, grad_scales, None, None, None, None


class PackedLoraLinearFunction(torch.autograd.Function):
    """`y = x @ W + scaling * (x @ A^T) @ B^T`, differentiable in `x`, `A` and `B`; see `lora_linear`.

    Saves `x`, `x @ A^T` and the factors, each in the dtype of `x`, and the packed tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, *packed: Any
    ) -> torch.Tensor:
        weight = PackedWeight(*packed)
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        hidden = _product(rows, a.t())
        y = _add_product(operators.linear(rows, weight), hidden, b.t(), scaling)
        qweight, qzeros, scales, g_idx, *ctx.layout = weight
        ctx.scaling, ctx.leading, ctx.dtypes = scaling, x.shape[:-1], (lora_a.dtype, lora_b.dtype)
        ctx.save_for_backward(
            rows if ctx.needs_input_grad[_LORA_A] else None,
            hidden if ctx.needs_input_grad[_LORA_B] else None,
            a, b, qweight, qzeros, scales, g_idx,
        )  # fmt: skip
        # an output that is a view must not be modified in place, which some models do
        return torch.ops.aten._unsafe_view(y, (*ctx.leading, y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, hidden, a, b, *packed = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        grad_hidden = _product(dy, b) * ctx.scaling
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = operators.linear_grad_x(dy, PackedWeight(*packed, *ctx.layout))
            grad_x = _add_product(grad_x, grad_hidden, a).view(*ctx.leading, a.shape[1])
        if ctx.needs_input_grad[_LORA_A]:
            grad_a = _product(grad_hidden.t(), rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[_LORA_B]:
            grad_b = _product(dy.t(), hidden).to(ctx.dtypes[1]) * ctx.scaling
        return grad_x, grad_a, grad_b, *[None] * 8


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _add_product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """`y + scaling * a @ b`; overwrites `y`."""
    # in eager mode the overhead of an operator exceeds the work
    add_product = operators.add_product_ if isinstance(y, FunctionalTensor) else eager.add_product_
    add_product(y, a, b, scaling)
    return y
