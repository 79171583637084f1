"""The packed products in plain PyTorch: the path of every device without a kernel of its own.

Weights are decoded a block of rows at a time, so that the integers in flight stay in the CPU's cache, and the scale
gradient is formed a block of rows at a time, so that no dense `[K, N]` gradient ever exists. `*packed` stands for the
arguments from `qweight` to `zero_offset` of `library.py`'s table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .packing import unpack_rows, unpack_zeros


# rows start on a multiple of 32 so that a block is whole words at every bit width
_ROW_ALIGNMENT = 32
_DECODE_BLOCK_ELEMENTS = 1 << 18
_GRADIENT_BLOCK_ROWS = 512


@dataclass(frozen=True)
class _Block:
    """Rows `[start, stop)` of the weight. `groups` is a slice of `[G, N]` whose rows each cover an equal run of the
    block's rows, or an int64 index `[stop - start]` of one group a row."""

    start: int
    stop: int
    groups: slice | torch.Tensor


def _blocks(rows: int, target: int, group_size: int, g_idx: torch.Tensor | None) -> Iterator[_Block]:
    """Cut `rows` rows into blocks of about `target` rows, each in whole words and, where possible, whole groups."""
    target = max(_ROW_ALIGNMENT, target // _ROW_ALIGNMENT * _ROW_ALIGNMENT)
    if g_idx is None and group_size % _ROW_ALIGNMENT and group_size < rows:
        g_idx = torch.arange(rows) // group_size
    if g_idx is not None:
        for start in range(0, rows, target):
            stop = min(start + target, rows)
            yield _Block(start, stop, g_idx[start:stop].long())
        return
    whole_groups = target // group_size * group_size
    start = 0
    while start < rows:
        group = start // group_size
        stop = start + whole_groups if whole_groups else min(start + target, (group + 1) * group_size)
        if stop > rows:  # the last block: the ragged group at its end is a block of its own
            full = (rows - start) // group_size * group_size
            stop = start + full if full else rows
        yield _Block(start, stop, slice(group, group + max(1, (stop - start) // group_size)))
        start = stop


def _spread(per_group: torch.Tensor, block: _Block) -> torch.Tensor:
    """Rows of `[G, N]` laid out to broadcast over the block seen as `[groups, rows per group, N]`."""
    if isinstance(block.groups, slice):
        return per_group[block.groups].unsqueeze(1)
    return per_group[block.groups.to(per_group.device)].unsqueeze(1)


def _centered(qweight: torch.Tensor, zeros: torch.Tensor, bits: int, block: _Block) -> torch.Tensor:
    """`q - z` of a block in the smallest signed integers, `[groups, rows per group, N]`."""
    codes = unpack_rows(qweight[block.start * bits // 32 : block.stop * bits // 32], bits)
    codes = codes.to(torch.int16) if bits == 8 else codes.view(torch.int8)
    spread_zeros = _spread(zeros, block).to(codes.dtype)
    return codes.view(spread_zeros.shape[0], -1, qweight.shape[1]).sub_(spread_zeros)


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
    rows, columns = qweight.shape[0] * 32 // bits, qweight.shape[1]
    zeros = unpack_zeros(qzeros, bits, zero_offset)
    scales = scales.float()
    weight = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    target = _DECODE_BLOCK_ELEMENTS // columns if qweight.device.type == "cpu" else rows
    for block in _blocks(rows, target, group_size, g_idx):
        centered = _centered(qweight, zeros, bits, block)
        out = weight[block.start : block.stop].view(centered.shape)
        if dtype == torch.float32:
            out.copy_(centered).mul_(_spread(scales, block))
        else:
            out.copy_(centered.float().mul_(_spread(scales, block)))
    return weight


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """16-bit products run in fp32 on the CPU: without AVX512-BF16 its bf16 product is two orders slower."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


def linear(x: torch.Tensor, *packed: Any) -> torch.Tensor:
    dtype = compute_dtype(x)
    weight = dequantize(*(*packed, dtype))
    return (x.to(dtype) @ weight).to(x.dtype)


def linear_grad_x(dy: torch.Tensor, *packed: Any) -> torch.Tensor:
    dtype = compute_dtype(dy)
    weight = dequantize(*(*packed, dtype))
    return (dy.to(dtype) @ weight.t()).to(dy.dtype)


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
    zeros = unpack_zeros(qzeros, bits, zero_offset)
    grad = torch.zeros(zeros.shape, dtype=torch.float32, device=dy.device)
    for block in _blocks(x.shape[1], _GRADIENT_BLOCK_ROWS, group_size, g_idx):
        centered = _centered(qweight, zeros, bits, block)
        tile = (x[:, block.start : block.stop].t() @ dy).view(centered.shape)
        per_run = centered.float().mul_(tile).sum(1)
        if isinstance(block.groups, slice):
            grad[block.groups] += per_run
        else:
            grad.index_add_(0, block.groups.to(grad.device), per_run)
    return grad
