"""The packed operators as Triton kernels.

A *unit* is a run of codes that fits into 32 bits: 16, 8, 8 and 4 codes at 2, 3, 4 and 8 bits. Units are whole words,
except at 3 bits, where three words hold four units of 24 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import launcher
from . import eager, operators
from .operators import PackedWeight


_UNIT_CODES = {2: 16, 3: 8, 4: 8, 8: 4}
# rows and columns of a tile; the fastest on an H100
_DECODE_TILE = (64, 128)
_ACT_ORDER_TILE = (16, 128)
_FEW_TOKENS_TILE = (64, 64)
_FEW_TOKENS_SPLITS = 8
_ADD_PRODUCT_TILE = (64, 128)
_TILE_ROWS = 128
_TILE_COLUMNS = 64
_PRODUCT_ROWS = 4096

# up to so many tokens `_few_tokens_kernel` beats decoding and cuBLAS on an H100
_FEW_TOKENS = 32
_FEW_TOKENS_BITS = (2, 4)
_FEW_TOKENS_WEIGHTS = 2**25

# how a kernel finds the group of a row
_GROUP_OF_UNIT, _GROUP_OF_ROW, _GROUP_INDEX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
        # in two steps, because a shift by 32 is undefined
        return (low >> shift[:, None].to(tl.uint32)) | ((high << 1) << (31 - shift[:, None]).to(tl.uint32))
    else:
        pointers = q_ptr + unit[:, None].to(tl.int64) * columns + column[None, :]
        return tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _codes(q_ptr, unit, column, columns, mask, BITS: tl.constexpr, UNIT: tl.constexpr):
    """The codes in the given units, int32 `[units, UNIT, columns]`."""
    units = _units(q_ptr, unit, column, columns, mask, BITS)
    shifts = (tl.arange(0, UNIT) * BITS).to(tl.uint32)
    return ((units[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _plus_one_in_every_field(words, BITS: tl.constexpr):
    if BITS == 2:
        words += 0x55555555
    elif BITS == 4:
        words += 0x11111111
    else:
        words += 0x01010101
    return words


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
            value = _plus_one_in_every_field(value, BITS)
        return ((value >> shift) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _zero_points_of_rows(
    z_ptr, group, inside, first_column, columns,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Zero points of rows, given their groups: int32 `[units, UNIT, COLUMNS]`, one or two loads per unit."""
    words = columns * BITS // 32
    unit = first_column // UNIT + tl.arange(0, COLUMNS // UNIT)
    word = unit
    if BITS == 3:
        word = unit // 4 * 3 + unit % 4 * 3 // 4
    pointers = z_ptr + group[:, :, None] * words + word[None, None, :]
    mask = inside[:, :, None] & (word < words)[None, None, :]
    value = tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        shift = unit % 4 * 24 % 32
        straddles = (shift > 8)[None, None, :]
        high = tl.load(pointers + 1, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
        shift = shift[None, None, :].to(tl.uint32)
        value = (value >> shift) | ((high << 1) << (31 - shift))
    elif V1:
        value = _plus_one_in_every_field(value, BITS)
    shifts = (tl.arange(0, UNIT) * BITS).to(tl.uint32)
    zeros = value[:, :, :, None] >> shifts[None, None, None, :]
    if BITS == 3:
        zeros += V1
    return tl.reshape((zeros & ((1 << BITS) - 1)).to(tl.int32), (group.shape[0], UNIT, COLUMNS))


@triton.jit
def _rows(unit, UNIT: tl.constexpr):
    return unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]


@triton.jit
def _weight(
    q_ptr, z_ptr, s_ptr, g_ptr, unit, first_column, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr, GROUPING: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weights in the given units, fp32 `[units, UNIT, COLUMNS]`.

    A kernel must not compute pointers that it stores to from this result: the compiler, which cannot look into this
    function, would assume that it writes to all tensors passed to it, and copy them.
    """
    column = first_column + tl.arange(0, COLUMNS)
    inside = (unit * UNIT < rows)[:, None] & (column < columns)[None, :]
    codes = _codes(q_ptr, unit, column, columns, inside, BITS, UNIT)
    row = _rows(unit, UNIT)
    if GROUPING == _GROUP_OF_UNIT:
        group = (unit * UNIT // group_size)[:, None]
        zeros = _zero_points(z_ptr, group, column[None, :], columns, inside, BITS, V1)[:, None, :]
        scales = tl.load(s_ptr + group * columns + column[None, :], mask=inside, other=0).to(tl.float32)[:, None, :]
    else:
        if GROUPING == _GROUP_OF_ROW:  # noqa: SIM108
            group = row // group_size
        else:
            group = tl.load(g_ptr + row, mask=row < rows, other=0)
        zeros = _zero_points_of_rows(z_ptr, group, row < rows, first_column, columns, BITS, UNIT, V1, COLUMNS)
        pointers = s_ptr + group[:, :, None] * columns + column[None, None, :]
        scales = tl.load(pointers, mask=inside[:, None, :], other=0).to(tl.float32)
    return (codes - zeros).to(tl.float32) * scales


@triton.jit
def _dequantize_kernel(
    q_ptr, z_ptr, s_ptr, g_ptr, out_ptr, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr, GROUPING: tl.constexpr,
    UNITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    first_column = tl.program_id(0) * COLUMNS
    weight = _weight(
        q_ptr, z_ptr, s_ptr, g_ptr, unit, first_column, rows, columns, group_size, BITS, UNIT, V1, GROUPING, COLUMNS
    )
    column = first_column + tl.arange(0, COLUMNS)
    row = _rows(unit, UNIT)
    inside = (row < rows)[:, :, None] & (column < columns)[None, None, :]
    pointers = out_ptr + row[:, :, None].to(tl.int64) * columns + column[None, None, :]
    tl.store(pointers, weight.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _few_tokens_kernel(
    x_ptr, q_ptr, z_ptr, s_ptr, g_ptr, out_ptr, tokens, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr, GROUPING: tl.constexpr,
    UNITS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`x @ W` over every `SPLITS`-th tile of rows, fp32 `[SPLITS, tokens, columns]`."""
    ROWS: tl.constexpr = UNITS * UNIT
    first_column = tl.program_id(0) * COLUMNS
    token = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), SPLITS):
        unit = tile * UNITS + tl.arange(0, UNITS)
        weight = _weight(
            q_ptr, z_ptr, s_ptr, g_ptr, unit, first_column, rows, columns, group_size,
            BITS, UNIT, V1, GROUPING, COLUMNS,
        )  # fmt: skip
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        x = tl.load(x_ptr + token[:, None] * rows + row[None, :], mask=inside, other=0)
        weight = tl.reshape(weight, (ROWS, COLUMNS)).to(x_ptr.dtype.element_ty)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    column = first_column + tl.arange(0, COLUMNS)
    pointers = out_ptr + (tl.program_id(1) * tokens + token)[:, None] * columns + column[None, :]
    tl.store(pointers, sums, mask=(token < tokens)[:, None] & (column < columns)[None, :])


@triton.jit
def _add_product_kernel(
    y_ptr, a_ptr, b_ptr, rows, columns, rank, scaling, a_row, a_rank, b_rank, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`y += scaling * a @ b`; `a_row` to `b_column` are strides."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        inside = (row < rows)[:, None] & (r < rank)[None, :]
        a = tl.load(a_ptr + row[:, None].to(tl.int64) * a_row + r[None, :] * a_rank, mask=inside, other=0)
        inside = (r < rank)[:, None] & (column < columns)[None, :]
        b = tl.load(b_ptr + r[:, None].to(tl.int64) * b_rank + column[None, :] * b_column, mask=inside, other=0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = y_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    y = tl.load(pointers, mask=inside, other=0).to(tl.float32) + scaling * sums
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _codes_of_rows(q_ptr, row, column, columns, mask, BITS: tl.constexpr):
    """Codes of single rows, int32 `[rows, columns]`."""
    bit = row * BITS
    shift = (bit % 32).to(tl.uint32)[:, None]
    pointers = q_ptr + (bit // 32)[:, None].to(tl.int64) * columns + column[None, :]
    codes = tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if BITS == 3:
        straddles = mask & (bit % 32 > 29)[:, None]
        high = tl.load(pointers + columns, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        codes |= (high << 1) << (31 - shift)
    return (codes & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _sum_over_rows_kernel(
    dw_ptr, q_ptr, z_ptr, order_ptr, out_ptr, first_tile, rows, columns, group_size,
    BITS: tl.constexpr, UNIT: tl.constexpr, V1: tl.constexpr, ORDERED: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`sum over rows of dW * (q - z)` for each group of a tile; `dw_ptr` starts at the first row of `first_tile`.

    The rows of `dW` are sorted by group; if `ORDERED`, `order_ptr` maps each one to its row of the weight.
    """
    tile = first_tile + tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if ORDERED:
        source = tl.load(order_ptr + row, mask=row < rows, other=0)
        codes = _codes_of_rows(q_ptr, source, column, columns, inside, BITS)
    else:
        unit = tile * (ROWS // UNIT) + tl.arange(0, ROWS // UNIT)
        whole = (unit * UNIT < rows)[:, None] & (column < columns)[None, :]
        codes = _codes(q_ptr, unit, column, columns, whole, BITS, UNIT)
    group = (tile * ROWS // group_size + tl.arange(0, GROUPS))[:, None]
    mask = (group * group_size < rows) & (column < columns)[None, :]
    zeros = _zero_points(z_ptr, group, column[None, :], columns, mask, BITS, V1)
    pointers = dw_ptr + (row - first_tile * ROWS)[:, None].to(tl.int64) * columns + column[None, :]
    dw = tl.reshape(tl.load(pointers, mask=inside, other=0).to(tl.float32), (GROUPS, ROWS // GROUPS, COLUMNS))
    codes = tl.reshape(codes, (GROUPS, ROWS // GROUPS, COLUMNS))
    sums = tl.sum(dw * (codes - zeros[:, None, :]).to(tl.float32), axis=1)
    tl.store(out_ptr + (tile * GROUPS + tl.arange(0, GROUPS))[:, None] * columns + column[None, :], sums, mask=mask)


def _layout(weight: PackedWeight) -> dict[str, Any]:
    """The kernels' arguments that describe the layout of codes and groups."""
    unit, group_size = _UNIT_CODES[weight.bits], weight.group_size
    grouping = _GROUP_INDEX
    if weight.g_idx is None:
        grouping = _GROUP_OF_ROW if group_size % unit and group_size < weight.rows else _GROUP_OF_UNIT
    return {"BITS": weight.bits, "UNIT": unit, "V1": weight.zero_offset, "GROUPING": grouping.value}


@operators.dequantize.triton
def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    qweight, qzeros, scales, g_idx, bits, group_size, _ = weight
    rows, columns = weight.rows, weight.columns
    tile_rows, tile_columns = _DECODE_TILE if g_idx is None else _ACT_ORDER_TILE
    out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    grid = (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows))
    launcher(_dequantize_kernel, qweight)[grid](
        qweight, qzeros, scales, g_idx, out, rows, columns, group_size,
        **_layout(weight),
        UNITS=tile_rows // _UNIT_CODES[bits],
        COLUMNS=tile_columns,
        num_warps=4 if g_idx is None else 1,
    )  # fmt: skip
    return out


@operators.linear.triton
def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    weights = weight.rows * weight.columns
    few = 0 < x.numel() // x.shape[-1] <= _FEW_TOKENS
    if few and weight.bits in _FEW_TOKENS_BITS and weights >= _FEW_TOKENS_WEIGHTS:
        return _linear_for_few_tokens(x, weight)
    return x @ dequantize(weight, x.dtype)


def _linear_for_few_tokens(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`x @ W`, decoding the weight in registers. Rows are split among programs, whose sums are added at the end."""
    qweight, qzeros, scales, g_idx, bits, group_size, _ = weight
    rows, columns = x.shape[-1], weight.columns
    tokens = x.numel() // rows
    tile_rows, tile_columns = _FEW_TOKENS_TILE
    splits = min(triton.cdiv(rows, tile_rows), _FEW_TOKENS_SPLITS)
    sums = torch.empty(splits, tokens, columns, dtype=torch.float32, device=x.device)
    launcher(_few_tokens_kernel, qweight)[(triton.cdiv(columns, tile_columns), splits)](
        x.reshape(tokens, rows).contiguous(), qweight, qzeros, scales, g_idx, sums, tokens, rows, columns, group_size,
        **_layout(weight),
        UNITS=tile_rows // _UNIT_CODES[bits],
        COLUMNS=tile_columns,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        SPLITS=splits,
        num_warps=2,
    )  # fmt: skip
    return torch.ops.aten._unsafe_view(sums.sum(0).to(x.dtype), (*x.shape[:-1], columns))


@operators.add_product_.triton
def add_product_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """A kernel because in compiled code `addmm` would copy `y` first."""
    rows, columns = y.shape
    tile_rows, tile_columns = _ADD_PRODUCT_TILE
    grid = (triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows))
    launcher(_add_product_kernel, y)[grid](
        y, a, b, rows, columns, a.shape[1], scaling, *a.stride(), *b.stride(),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        RANK=16 if a.shape[1] <= 16 else 32,
        num_warps=4,
    )  # fmt: skip


@operators.linear_grad_x.triton
def linear_grad_x(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return dy @ dequantize(weight, dy.dtype).t()


def _tile(rows: int, group_size: int, bits: int) -> tuple[int, int] | None:
    """Rows and groups of a tile: whole groups, or a power of two of rows that divides a group.

    Returns None for group sizes that allow neither.
    """
    if group_size >= rows:
        return _TILE_ROWS, 1
    power_of_two = group_size & -group_size
    if power_of_two == group_size and group_size <= _TILE_ROWS:
        return _TILE_ROWS, _TILE_ROWS // group_size
    if power_of_two >= _UNIT_CODES[bits]:
        return min(power_of_two, _TILE_ROWS), 1
    return None


@operators.linear_grad_scales.triton
def linear_grad_scales(
    x: torch.Tensor, dy: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, *layout: Any
) -> torch.Tensor:
    """Compute `dW` with cuBLAS in the dtype of `x`, a tile of rows at a time, and sum each tile with a kernel.

    With act-order, rows are computed in the order of their groups. On an H100 a single kernel that kept `dW` in
    registers was slower.
    """
    g_idx, bits, group_size, zero_offset = layout
    rows, columns = x.shape[-1], dy.shape[-1]
    tile = _tile(rows, group_size, bits)
    if tile is None:
        return eager.linear_grad_scales(x, dy, qweight, qzeros, *layout)
    tile_rows, tile_groups = tile
    tiles = triton.cdiv(rows, tile_rows)
    sums = torch.empty(tiles * tile_groups, columns, dtype=torch.float32, device=x.device)
    x, dy = x.reshape(-1, rows), dy.reshape(-1, columns)
    order = None
    if g_idx is not None:
        order = torch.argsort(g_idx, stable=True)
        x = x[:, order]
    tiles_in_product = max(1, _PRODUCT_ROWS // tile_rows)
    for first_tile in range(0, tiles, tiles_in_product):
        first_row = first_tile * tile_rows
        dw = x[:, first_row : first_row + tiles_in_product * tile_rows].t() @ dy
        grid = (triton.cdiv(columns, _TILE_COLUMNS), triton.cdiv(dw.shape[0], tile_rows))
        launcher(_sum_over_rows_kernel, qweight)[grid](
            dw, qweight, qzeros, order, sums, first_tile, rows, columns, group_size,
            BITS=bits,
            UNIT=_UNIT_CODES[bits],
            V1=zero_offset,
            ORDERED=order is not None,
            ROWS=tile_rows,
            GROUPS=tile_groups,
            COLUMNS=_TILE_COLUMNS,
            num_warps=4,
        )  # fmt: skip
    groups = qzeros.shape[0]
    if tile_rows >= group_size or tiles == groups:
        return sums[:groups]
    group = torch.arange(tiles, device=x.device) * tile_rows // group_size
    return sums.new_zeros(groups, columns).index_add_(0, group, sums)
