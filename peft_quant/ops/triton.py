"""The packed operators as Triton kernels.

A *unit* is a run of codes that fits into 32 bits: 16, 8, 8 and 4 codes at 2, 3, 4 and 8 bits. Units are whole words,
but for 3 bits, where four units of 24 bits lie in three words. A tile is whole groups, or a power of two of rows of
one group, so that a program needs few scales and zero points a column; in act-order, where each row of a tile may be
of another group, it gathers them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import eager


_UNIT_CODES = {2: 16, 3: 8, 4: 8, 8: 4}
_TILE_ROWS = 128
_TILE_COLUMNS = 64
_PRODUCT_ROWS = 4096


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
    ROWS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    codes, row = _codes(q_ptr, tile, column, rows, columns, BITS, UNIT, ROWS)
    if ACT_ORDER:
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        group = tl.load(g_ptr + row, mask=row < rows, other=0)[:, None]
        zeros = _zero_points(z_ptr, group, column[None, :], columns, mask, BITS, V1)
        scales = tl.load(s_ptr + group * columns + column[None, :], mask=mask, other=0).to(tl.float32)
        weight = (codes - zeros).to(tl.float32) * scales
    else:
        group = (tile * ROWS // group_size + tl.arange(0, GROUPS))[:, None]
        mask = (group * group_size < rows) & (column < columns)[None, :]
        zeros = _zero_points(z_ptr, group, column[None, :], columns, mask, BITS, V1)
        scales = tl.load(s_ptr + group * columns + column[None, :], mask=mask, other=0).to(tl.float32)
        codes = tl.reshape(codes, (GROUPS, ROWS // GROUPS, COLUMNS))
        weight = tl.reshape((codes - zeros[:, None, :]).to(tl.float32) * scales[:, None, :], (ROWS, COLUMNS))
    pointers = out_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(pointers, weight.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _sum_over_rows_kernel(
    dw_ptr, q_ptr, z_ptr, out_ptr, first_tile, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`sum over rows of dW * (q - z)` for each group of a tile; `dw_ptr` begins at the row of `first_tile`."""
    tile = first_tile + tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    codes, row = _codes(q_ptr, tile, column, rows, columns, BITS, UNIT, ROWS)
    group = (tile * ROWS // group_size + tl.arange(0, GROUPS))[:, None]
    mask = (group * group_size < rows) & (column < columns)[None, :]
    zeros = _zero_points(z_ptr, group, column[None, :], columns, mask, BITS, V1)
    pointers = dw_ptr + (row - first_tile * ROWS)[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    dw = tl.reshape(tl.load(pointers, mask=inside, other=0).to(tl.float32), (GROUPS, ROWS // GROUPS, COLUMNS))
    codes = tl.reshape(codes, (GROUPS, ROWS // GROUPS, COLUMNS))
    sums = tl.sum(dw * (codes - zeros[:, None, :]).to(tl.float32), axis=1)
    tl.store(out_ptr + (tile * GROUPS + tl.arange(0, GROUPS))[:, None] * columns + column[None, :], sums, mask=mask)


def _tile(rows: int, group_size: int, bits: int) -> tuple[int, int] | None:
    """Rows of a tile and groups in it: whole groups, or a power of two of rows that divides a group.

    None for group sizes that neither fits: such a layout is treated as act-order.
    """
    if group_size >= rows:
        return _TILE_ROWS, 1
    power_of_two = group_size & -group_size
    if power_of_two == group_size and group_size <= _TILE_ROWS:
        return _TILE_ROWS, _TILE_ROWS // group_size
    if power_of_two >= _UNIT_CODES[bits]:
        return min(power_of_two, _TILE_ROWS), 1
    return None


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
    tile = _tile(rows, group_size, bits)
    if tile is None and g_idx is None:
        g_idx = torch.arange(rows, dtype=torch.int32, device=qweight.device) // group_size
    tile_rows, tile_groups = (_TILE_ROWS, 1) if tile is None else tile
    out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    _dequantize_kernel[(triton.cdiv(columns, _TILE_COLUMNS), triton.cdiv(rows, tile_rows))](
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
        GROUPS=tile_groups,
        COLUMNS=_TILE_COLUMNS,
        num_warps=4,
    )
    return out


def linear(x: torch.Tensor, *packed: Any) -> torch.Tensor:
    return x @ dequantize(*(*packed, x.dtype))


def linear_grad_x(dy: torch.Tensor, *packed: Any) -> torch.Tensor:
    return dy @ dequantize(*(*packed, dy.dtype)).t()


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
    """`dW` is formed by cuBLAS, in the dtype of `x` and a tile of rows at a time, and summed at once by a kernel.

    On an H100 one kernel that kept `dW` in registers was slower.
    """
    rows, columns = x.shape[-1], dy.shape[-1]
    tile = _tile(rows, group_size, bits)
    if g_idx is not None or tile is None:
        return eager.linear_grad_scales(x, dy, qweight, qzeros, g_idx, bits, group_size, zero_offset)
    tile_rows, tile_groups = tile
    tiles = triton.cdiv(rows, tile_rows)
    sums = torch.empty(tiles * tile_groups, columns, dtype=torch.float32, device=x.device)
    x, dy = x.reshape(-1, rows), dy.reshape(-1, columns)
    tiles_in_product = max(1, _PRODUCT_ROWS // tile_rows)
    for first_tile in range(0, tiles, tiles_in_product):
        first_row = first_tile * tile_rows
        dw = x[:, first_row : first_row + tiles_in_product * tile_rows].t() @ dy
        _sum_over_rows_kernel[(triton.cdiv(columns, _TILE_COLUMNS), triton.cdiv(dw.shape[0], tile_rows))](
            dw,
            qweight,
            qzeros,
            sums,
            first_tile,
            rows,
            columns,
            group_size,
            BITS=bits,
            UNIT=_UNIT_CODES[bits],
            V1=zero_offset,
            ROWS=tile_rows,
            GROUPS=tile_groups,
            COLUMNS=_TILE_COLUMNS,
            num_warps=4,
        )
    groups = qzeros.shape[0]
    if tile_rows >= group_size or tiles == groups:
        return sums[:groups]
    group = torch.arange(tiles, device=x.device) * tile_rows // group_size
    return sums.new_zeros(groups, columns).index_add_(0, group, sums)
