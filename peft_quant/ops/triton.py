"""The packed operators as Triton kernels.

A *unit* is a run of codes that fits into 32 bits: 16, 8, 8 and 4 codes at 2, 3, 4 and 8 bits. Units are whole words,
but for 3 bits, where four units of 24 bits lie in three words. A tile is a power of two of rows within one group, so
that a program needs one scale and one zero point a column; in act-order, where rows of a tile belong to different
groups, it gathers them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import eager


_UNIT_CODES = {2: 16, 3: 8, 4: 8, 8: 4}
_TILE_ROWS = 128
_TILE_COLUMNS = 64


@triton.jit
def _units(q_ptr, unit, column, columns, mask, BITS: tl.constexpr):
    """32-bit units of codes, uint32 `[units, columns]`."""
    if BITS == 3:
        part = unit % 4
        word = unit // 4 * 3 + part * 3 // 4
        shift = part * 24 % 32
        straddles = (part == 1) | (part == 2)
        pointers = q_ptr + word[:, None].to(tl.int64) * columns + column[None, :]
        low = tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(pointers + columns, mask=mask & straddles[:, None], other=0).to(tl.uint32, bitcast=True)
        # a shift by 32 is undefined, hence in two steps
        return (low >> shift[:, None].to(tl.uint32)) | ((high << 1) << (31 - shift[:, None]).to(tl.uint32))
    else:
        pointers = q_ptr + unit[:, None].to(tl.int64) * columns + column[None, :]
        return tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _zero_points(z_ptr, group, column, columns, mask, BITS: tl.constexpr, V1: tl.constexpr):
    """Zero points as int32, in the common shape of `group` and `column`."""
    words = columns * BITS // 32
    bit = column * BITS
    word = bit // 32
    shift = (bit % 32).to(tl.uint32)
    pointers = z_ptr + group * words + word
    value = tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        straddles = bit % 32 > 29
        high = tl.load(pointers + 1, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
        value = (value >> shift) | ((high << 1) << (31 - shift))
        return ((value + V1) & 7).to(tl.int32)
    else:
        if V1:
            if BITS == 2:
                value += 0x55555555
            elif BITS == 4:
                value += 0x11111111
            else:
                value += 0x01010101
        return ((value >> shift) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _codes(q_ptr, tile, column, rows, columns, BITS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr):
    """Codes of a tile, int32 `[ROWS, columns]`, and its row numbers."""
    UNITS: tl.constexpr = ROWS // UNIT
    unit = tile * UNITS + tl.arange(0, UNITS)
    mask = (unit * UNIT < rows)[:, None] & (column < columns)[None, :]
    units = _units(q_ptr, unit, column, columns, mask, BITS)
    shifts = (tl.arange(0, UNIT) * BITS).to(tl.uint32)
    codes = (units[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (ROWS, column.shape[0])).to(tl.int32), tile * ROWS + tl.arange(0, ROWS)


@triton.jit
def _dequantize_kernel(
    q_ptr, z_ptr, s_ptr, g_ptr, out_ptr, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr, ACT_ORDER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    codes, row = _codes(q_ptr, tile, column, rows, columns, BITS, UNIT, ROWS)
    if ACT_ORDER:
        group = tl.load(g_ptr + row, mask=row < rows, other=0)[:, None]
        mask = (row < rows)[:, None] & inside[None, :]
        zeros = _zero_points(z_ptr, group, column[None, :], columns, mask, BITS, V1)
        scales = tl.load(s_ptr + group * columns + column[None, :], mask=mask, other=0).to(tl.float32)
    else:
        group = tile * ROWS // group_size
        zeros = _zero_points(z_ptr, group, column, columns, inside, BITS, V1)[None, :]
        scales = tl.load(s_ptr + group * columns + column, mask=inside, other=0).to(tl.float32)[None, :]
    weight = (codes - zeros).to(tl.float32) * scales
    pointers = out_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(pointers, weight.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def _grad_scales_kernel(
    x_ptr, dy_ptr, q_ptr, z_ptr, partial_ptr, tokens, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """One tile of `x^T dy`, multiplied by `q - z` and summed over its rows: fp32 `[tiles, columns]`."""
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    # neighbouring programs share rows of x and columns of dy in the L2 cache
    in_block = SWIZZLE * column_tiles
    first = program // in_block * SWIZZLE
    height = tl.minimum(tiles - first, SWIZZLE)
    tile = first + program % in_block % height
    column = program % in_block // height * COLUMNS + tl.arange(0, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = column < columns
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        x = tl.load(
            x_ptr + token[None, :].to(tl.int64) * rows + row[:, None],
            mask=(token < tokens)[None, :] & (row < rows)[:, None],
            other=0,
        )
        dy = tl.load(
            dy_ptr + token[:, None].to(tl.int64) * columns + column[None, :],
            mask=(token < tokens)[:, None] & inside[None, :],
            other=0,
        )
        product = tl.dot(x, dy, product, input_precision="ieee")
    codes, _ = _codes(q_ptr, tile, column, rows, columns, BITS, UNIT, ROWS)
    zeros = _zero_points(z_ptr, tile * ROWS // group_size, column, columns, inside, BITS, V1)
    centered = (codes - zeros[None, :]).to(tl.float32)
    tl.store(partial_ptr + tile * columns + column, tl.sum(product * centered, axis=0), mask=inside)


def _tile_rows(rows: int, group_size: int, bits: int) -> int:
    """The largest power of two of rows that divides a group, up to a limit; at least one unit."""
    whole = rows if group_size >= rows else group_size
    divisor = min(_TILE_ROWS, whole & -whole) if group_size < rows else _TILE_ROWS
    return max(divisor, _UNIT_CODES[bits])


def _tiles_fit(rows: int, group_size: int, bits: int) -> bool:
    """Whether tiles lie within groups: false for groups that are no multiple of a unit."""
    return group_size >= rows or group_size % _UNIT_CODES[bits] == 0


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
    if g_idx is None and not _tiles_fit(rows, group_size, bits):
        g_idx = torch.arange(rows, dtype=torch.int32, device=qweight.device) // group_size
    tile_rows = _TILE_ROWS if g_idx is not None else _tile_rows(rows, group_size, bits)
    out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    grid = triton.cdiv(columns, _TILE_COLUMNS), triton.cdiv(rows, tile_rows)
    _dequantize_kernel[grid](
        qweight,
        qzeros,
        scales,
        g_idx,
        out,
        rows,
        columns,
        group_size,
        BITS=bits,
        UNIT=_UNIT_CODES[bits],
        V1=zero_offset,
        ACT_ORDER=g_idx is not None,
        ROWS=tile_rows,
        COLUMNS=_TILE_COLUMNS,
        num_warps=4,
    )
    return out


def linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor:
    return x @ dequantize(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, x.dtype)


def linear_grad_x(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor:
    return dy @ dequantize(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dy.dtype).t()


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
    rows, columns = x.shape[-1], dy.shape[-1]
    tile_rows = _tile_rows(rows, group_size, bits)
    if g_idx is not None or not _tiles_fit(rows, group_size, bits) or tile_rows < 16:  # 16: the least of a product
        return eager.linear_grad_scales(x, dy, qweight, qzeros, g_idx, bits, group_size, zero_offset)
    x, dy = x.reshape(-1, rows).contiguous(), dy.reshape(-1, columns).contiguous()
    tiles = triton.cdiv(rows, tile_rows)
    partial = torch.empty(tiles, columns, dtype=torch.float32, device=x.device)
    block_columns = 128
    _grad_scales_kernel[(tiles * triton.cdiv(columns, block_columns),)](
        x,
        dy,
        qweight,
        qzeros,
        partial,
        x.shape[0],
        rows,
        columns,
        group_size,
        BITS=bits,
        UNIT=_UNIT_CODES[bits],
        V1=zero_offset,
        ROWS=tile_rows,
        COLUMNS=block_columns,
        TOKENS=64 if x.dtype != torch.float32 else 32,
        SWIZZLE=8,
        num_warps=8,
        num_stages=3,
    )
    groups = qzeros.shape[0]
    if tiles == groups:
        return partial
    group = torch.arange(tiles, device=x.device) * tile_rows // group_size
    return partial.new_zeros(groups, columns).index_add_(0, group, partial)
