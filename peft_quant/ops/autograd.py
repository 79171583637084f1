"""The packed product with gradients.

Saves the packed tensors, and `x` only if a scale gradient is wanted; the weight is decoded again in backward. With one
group (`group_size=-1` in GPTQ's terms) it saves its output in place of `x`, because
`dscales[n] = sum_m dy[m, n] * y[m, n] / scales[n]` then needs no product.
"""

from __future__ import annotations

from typing import Any

import torch


_SCALES = 3  # position among the inputs


class PackedLinear(torch.autograd.Function):
    """`y = x @ W`, differentiable in `x` and `scales`; arguments as those of `peft_quant::linear`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *packed: Any) -> torch.Tensor:
        qweight, qzeros, scales, g_idx, *ctx.layout = packed
        y = torch.ops.peft_quant.linear(x, *packed)
        saved = None
        if ctx.needs_input_grad[_SCALES]:
            saved = y if scales.shape[0] == 1 else x
        ctx.save_for_backward(saved, qweight, qzeros, scales, g_idx)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, qweight, qzeros, scales, g_idx = ctx.saved_tensors
        grad_x = grad_scales = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.peft_quant.linear_grad_x(dy, qweight, qzeros, scales, g_idx, *ctx.layout)
        if ctx.needs_input_grad[_SCALES]:
            if scales.shape[0] == 1:
                products = (dy.float() * saved.float()).reshape(-1, dy.shape[-1])
                grad_scales = products.sum(0, keepdim=True) / scales
            else:
                grad_scales = torch.ops.peft_quant.linear_grad_scales(saved, dy, qweight, qzeros, g_idx, *ctx.layout)
            grad_scales = grad_scales.to(scales.dtype)
        return grad_x, None, None, grad_scales, None, None, None, None
