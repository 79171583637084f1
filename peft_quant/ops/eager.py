"""The packed products in plain PyTorch: the path of every device without a kernel of its own.

On the CPU the products decode a block of rows at a time into the same memory, and so does the scale gradient on every
device: no dense weight and no dense gradient of it ever exists. `*packed` stands for the arguments from `qweight` to
`zero_offset` of `library.py`'s table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import bags
from .decode import Block, Decoder, blocks


_DECODE_BLOCK_ELEMENTS = 1 << 20
_PRODUCT_BLOCK_ROWS = 256  # at least: shorter ones make slow products
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
    if dtype == torch.float32:
        for block in blocks(decoder.rows, _decode_rows(decoder), group_size, g_idx):
            decoder.decode(block, weight[block.start : block.stop])
    else:
        for block, decoded in _decoded(decoder, _decode_rows(decoder), group_size, g_idx):
            weight[block.start : block.stop] = decoded
    return weight


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """16-bit products run in fp32 on the CPU: without AVX512-BF16 its bf16 product is two orders slower."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


def _decode_rows(decoder: Decoder) -> int:
    return _DECODE_BLOCK_ELEMENTS // decoder.columns


def _decoded(
    decoder: Decoder, target: int, group_size: int, g_idx: torch.Tensor | None
) -> Iterator[tuple[Block, torch.Tensor]]:
    """Blocks of about `target` rows and their fp32 values, which the next block overwrites."""
    buffer = torch.empty(0, device=decoder.qweight.device)
    for block in blocks(decoder.rows, target, group_size, g_idx):
        rows = block.stop - block.start
        if rows > len(buffer):
            buffer = torch.empty(rows, decoder.columns, device=decoder.qweight.device)
        yield block, decoder.decode(block, buffer[:rows])


def linear(x: torch.Tensor, *packed: Any) -> torch.Tensor:
    if x.device.type != "cpu":
        return x @ dequantize(*(*packed, x.dtype))
    tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    y = bags.product(tokens, *packed) if 0 < len(tokens) <= bags.MAX_TOKENS else None
    if y is None:
        y = _linear_in_blocks(tokens, *packed)
    return y.view(*x.shape[:-1], y.shape[1]).to(x.dtype)


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
    y = tokens.new_zeros(len(tokens), decoder.columns)
    for block, weight in _decoded(decoder, max(_decode_rows(decoder), _PRODUCT_BLOCK_ROWS), group_size, g_idx):
        y.addmm_(tokens[:, block.start : block.stop], weight)
    return y


def linear_grad_x(dy: torch.Tensor, *packed: Any) -> torch.Tensor:
    if dy.device.type != "cpu":
        return dy @ dequantize(*(*packed, dy.dtype)).t()
    qweight, qzeros, scales, g_idx, bits, group_size, zero_offset = packed
    decoder = Decoder(qweight, qzeros, scales, bits, zero_offset)
    tokens = dy.reshape(-1, dy.shape[-1]).to(compute_dtype(dy))
    dx = tokens.new_empty(len(tokens), decoder.rows)
    for block, weight in _decoded(decoder, max(_decode_rows(decoder), _PRODUCT_BLOCK_ROWS), group_size, g_idx):
        torch.mm(tokens, weight.t(), out=dx[:, block.start : block.stop])
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
    for block, centered in _decoded(decoder, _GRADIENT_BLOCK_ROWS, group_size, g_idx):
        products = centered.mul_(x[:, block.start : block.stop].t() @ dy)
        if isinstance(block.groups, slice):
            grad[block.groups] += products.view(block.groups.stop - block.groups.start, -1, decoder.columns).sum(1)
        else:
            grad.index_add_(0, block.groups.to(grad.device), products)
    return grad
