"""The packed products in plain PyTorch: the path of every device without a kernel of its own.

On the CPU the products decode a block of rows at a time into the same memory, and so does the scale gradient on every
device: no dense weight and no dense gradient of it ever exists. `*packed` stands for the arguments from `qweight` to
`zero_offset` of `library.py`'s table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import few_tokens
from .decode import ROW_ALIGNMENT, Decoder, blocks


_DECODE_BLOCK_ELEMENTS = 1 << 20
_PRODUCT_BLOCK_ROWS = 512
_GRADIENT_BLOCK_ROWS = 512


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    decoder = Decoder(qweight, qzeros, scales, bits, zero_offset)
    weight = torch.empty(decoder.rows, decoder.columns, dtype=dtype, device=qweight.device)
    target = _DECODE_BLOCK_ELEMENTS // decoder.columns
    buffer = None if dtype == torch.float32 else _buffer(decoder, target)
    for block in blocks(decoder.rows, target, group_size, g_idx):
        out = weight[block.start : block.stop]
        if buffer is None:
            decoder.decode(block, out)
        else:
            out.copy_(decoder.decode(block, buffer[: len(out)]))
    return weight


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """16-bit products run in fp32 on the CPU: without AVX512-BF16 its bf16 product is two orders slower."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


def _buffer(decoder: Decoder, target: int) -> torch.Tensor:
    """Room for any of the blocks of about `target` rows."""
    return torch.empty(max(target, ROW_ALIGNMENT), decoder.columns, device=decoder.qweight.device)


def _decoded(
    decoder: Decoder, tokens: int, group_size: int, g_idx: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Runs of rows long enough for a product, with their fp32 values, which the next run overwrites.

    A run takes no more memory than twice what so many tokens take, or 512 rows and a block.
    """
    run = max(_PRODUCT_BLOCK_ROWS, 2 * tokens)
    target = _DECODE_BLOCK_ELEMENTS // decoder.columns
    buffer = _buffer(decoder, min(run, decoder.rows) + max(target, ROW_ALIGNMENT))
    start = 0
    for block in blocks(decoder.rows, target, group_size, g_idx):
        decoder.decode(block, buffer[block.start - start : block.stop - start])
        if block.stop - start >= run or block.stop == decoder.rows:
            yield slice(start, block.stop), buffer[: block.stop - start]
            start = block.stop


def add_product_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    dtype = compute_dtype(y)
    if dtype == y.dtype:
        y.addmm_(a, b, alpha=scaling)
    else:
        y.add_((a.to(dtype) @ b.to(dtype)).to(y.dtype), alpha=scaling)


def linear(x: torch.Tensor, *packed: Any) -> torch.Tensor:
    if x.device.type != "cpu":
        return x @ dequantize(*(*packed, x.dtype))
    tokens = x.reshape(-1, x.shape[-1])
    y = few_tokens.product(tokens, *packed) if 0 < len(tokens) <= few_tokens.MAX_TOKENS else None
    if y is None:
        y = _linear_in_blocks(tokens.to(compute_dtype(x)), *packed)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])).to(x.dtype)


def _linear_in_blocks(
    tokens: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor:
    decoder = Decoder(qweight, qzeros, scales, bits, zero_offset)
    y = tokens.new_empty(len(tokens), decoder.columns)
    for rows, weight in _decoded(decoder, len(tokens), group_size, g_idx):
        if rows.start == 0:
            torch.mm(tokens[:, rows], weight, out=y)
        else:
            y.addmm_(tokens[:, rows], weight)
    return y


def linear_grad_x(dy: torch.Tensor, *packed: Any) -> torch.Tensor:
    if dy.device.type != "cpu":
        return dy @ dequantize(*(*packed, dy.dtype)).t()
    qweight, qzeros, scales, g_idx, bits, group_size, zero_offset = packed
    decoder = Decoder(qweight, qzeros, scales, bits, zero_offset)
    tokens = dy.reshape(-1, dy.shape[-1]).to(compute_dtype(dy))
    dx = tokens.new_empty(len(tokens), decoder.rows)
    for rows, weight in _decoded(decoder, len(tokens), group_size, g_idx):
        torch.mm(tokens, weight.t(), out=dx[:, rows])
    return dx.view(*dy.shape[:-1], decoder.rows).to(dy.dtype)


def linear_grad_scales(
    x: torch.Tensor,
    dy: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor:
    dtype = compute_dtype(x)
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
    decoder = Decoder(qweight, qzeros, None, bits, zero_offset)
    grad = torch.zeros(len(qzeros), decoder.columns, dtype=torch.float32, device=dy.device)
    buffer = _buffer(decoder, _GRADIENT_BLOCK_ROWS)
    for block in blocks(decoder.rows, _GRADIENT_BLOCK_ROWS, group_size, g_idx):
        centered = decoder.decode(block, buffer[: block.stop - block.start])
        products = centered.mul_(x[:, block.start : block.stop].t() @ dy)
        if isinstance(block.groups, slice):
            grad[block.groups] += products.view(block.groups.stop - block.groups.start, -1, decoder.columns).sum(1)
        else:
            grad.index_add_(0, block.groups.to(grad.device), products)
    return grad
