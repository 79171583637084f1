"""The packed products in plain PyTorch, for devices without a kernel.

On the CPU the products decode a block of rows at a time into one reused buffer, and so does the scale gradient on
every device: the whole dense weight, or its dense gradient, never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..dispatch import compute_dtype
from . import few_tokens, operators
from .decode import ROW_ALIGNMENT, Decoder, blocks
from .operators import PackedWeight


_DECODE_BLOCK_ELEMENTS = 1 << 20
_PRODUCT_BLOCK_ROWS = 512
_GRADIENT_BLOCK_ROWS = 512


@operators.dequantize.eager
def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    decoder = Decoder(weight)
    dense = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.qweight.device)
    target = _DECODE_BLOCK_ELEMENTS // weight.columns
    buffer = None if dtype == torch.float32 else _buffer(weight, target)
    for block in blocks(weight, target):
        out = dense[block.start : block.stop]
        if buffer is None:
            decoder.decode(block, out)
        else:
            out.copy_(decoder.decode(block, buffer[: len(out)]))
    return dense


def _buffer(weight: PackedWeight, target: int) -> torch.Tensor:
    """An fp32 buffer that fits every block of about `target` rows."""
    return torch.empty(max(target, ROW_ALIGNMENT), weight.columns, device=weight.qweight.device)


def _decoded(weight: PackedWeight, tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield runs of rows long enough for a product, with their fp32 values, which the next run overwrites.

    A run takes at most the memory of twice as many rows as there are tokens, or of 512 rows, plus one block.
    """
    decoder = Decoder(weight)
    run = max(_PRODUCT_BLOCK_ROWS, 2 * tokens)
    target = _DECODE_BLOCK_ELEMENTS // weight.columns
    buffer = _buffer(weight, min(run, weight.rows) + max(target, ROW_ALIGNMENT))
    start = 0
    for block in blocks(weight, target):
        decoder.decode(block, buffer[block.start - start : block.stop - start])
        if block.stop - start >= run or block.stop == weight.rows:
            yield slice(start, block.stop), buffer[: block.stop - start]
            start = block.stop


@operators.add_product_.eager
def add_product_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    dtype = compute_dtype(y)
    if dtype == y.dtype:
        y.addmm_(a, b, alpha=scaling)
    else:
        y.add_((a.to(dtype) @ b.to(dtype)).to(y.dtype), alpha=scaling)


@operators.linear.eager
def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    if x.device.type != "cpu":
        return x @ dequantize(weight, x.dtype)
    tokens = x.reshape(-1, x.shape[-1])
    y = few_tokens.linear(tokens, weight)
    if y is None:
        y = _linear_in_blocks(tokens.to(compute_dtype(x)), weight)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])).to(x.dtype)


def _linear_in_blocks(tokens: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    y = tokens.new_empty(len(tokens), weight.columns)
    for rows, dense in _decoded(weight, len(tokens)):
        if rows.start == 0:
            torch.mm(tokens[:, rows], dense, out=y)
        else:
            y.addmm_(tokens[:, rows], dense)
    return y


@operators.linear_grad_x.eager
def linear_grad_x(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    if dy.device.type != "cpu":
        return dy @ dequantize(weight, dy.dtype).t()
    tokens = dy.reshape(-1, dy.shape[-1]).to(compute_dtype(dy))
    dx = tokens.new_empty(len(tokens), weight.rows)
    for rows, dense in _decoded(weight, len(tokens)):
        torch.mm(tokens, dense.t(), out=dx[:, rows])
    return dx.view(*dy.shape[:-1], weight.rows).to(dy.dtype)


@operators.linear_grad_scales.eager
def linear_grad_scales(
    x: torch.Tensor, dy: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, *layout: Any
) -> torch.Tensor:
    weight = PackedWeight(qweight, qzeros, torch.ones(len(qzeros), 1, device=qzeros.device), *layout)
    dtype = compute_dtype(x)
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
    decoder = Decoder(weight)
    grad = torch.zeros(len(qzeros), weight.columns, dtype=torch.float32, device=dy.device)
    buffer = _buffer(weight, _GRADIENT_BLOCK_ROWS)
    for block in blocks(weight, _GRADIENT_BLOCK_ROWS):
        centered = decoder.decode(block, buffer[: block.stop - block.start])
        products = centered.mul_(x[:, block.start : block.stop].t() @ dy)
        if isinstance(block.groups, slice):
            grad[block.groups] += products.view(block.groups.stop - block.groups.start, -1, weight.columns).sum(1)
        else:
            grad.index_add_(0, block.groups.to(grad.device), products)
    return grad
