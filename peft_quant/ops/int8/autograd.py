"""The int8 product with gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..dispatch import compute_dtype
from . import operators
from .operators import EncodedWeight


class Int8LinearFunction(torch.autograd.Function):
    """`y = x @ W^T + b`, differentiable in `x`, `weight` and `bias`.

    `weight` is a tensor subclass that holds `encoded`. Saves `encoded`, which backward decodes again, and, if the
    weight is trained, `x`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, encoded: EncodedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, *encoded)
        with _no_autocast(x):
            return operators.int8_linear(x, encoded, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *encoded = ctx.saved_tensors
        dx = dw = db = None
        with _no_autocast(dy):
            if ctx.needs_input_grad[0]:
                dx = operators.int8_linear_grad_x(dy, EncodedWeight(*encoded))
            dy = dy.reshape(-1, dy.shape[-1])
            if ctx.needs_input_grad[1]:
                dtype = compute_dtype(dy)
                dw = (dy.to(dtype).t() @ x.reshape(-1, x.shape[-1]).to(dtype)).to(ctx.dtypes[0])
            if ctx.needs_input_grad[3]:
                db = dy.sum(0).to(ctx.dtypes[1])
        return dx, dw, None, db


def _no_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # no autocast on meta
