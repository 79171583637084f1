"""The int8 operators as Triton kernels, bit-identical to `eager.py`: same order of operations, nothing fused.

In the gradient and optimizer kernels a program takes two blocks of 256 elements per warp, 16 elements per thread, so
that int8 loads and stores are 16 bytes wide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F  # noqa: N812

from ..dispatch import launcher
from ..rounding import key_words
from . import eager as int8
from . import operators
from .operators import EncodedWeight, LionStep


_BLOCK = tl.constexpr(int8.BLOCK)
_SMALLEST = tl.constexpr(int8.SMALLEST)
_RANGE = tl.constexpr(int8.RANGE)
_STEP = tl.constexpr(1 / int8.RANGE)
_STOCHASTIC = tl.constexpr(int8.STOCHASTIC)
_ERROR_FEEDBACK = tl.constexpr(int8.ERROR_FEEDBACK)
_WARPS = 4
_WARPS_OF_INT8_LION = 1
# elements of a row; 8 per thread, so that loads of codes and stores of bf16 share a layout
_TILE = 256 * _WARPS
_TILES = 4


@triton.jit
def _words(index, low, high):
    """One random uint32 word per element; see `rounding.random_words`."""
    x = index.to(tl.uint32) ^ low.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ high.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dither(words, HALF: tl.constexpr):
    """fp32 in (-1/2, 1/2): the mantissa of a number in (1, 2) is set to 16 random bits and a half."""
    mantissa = words << 7 if HALF == 0 else words >> 9
    return ((mantissa & 0x7FFF80) | 0x3F800040).to(tl.float32, bitcast=True) - 1.5


@triton.jit
def _to_float(codes):
    """int8 to fp32, by adding to the lowest bits of 1.5 * 2**23: converting bytes takes four times as long."""
    return (codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _round(x):
    """Round fp32 to the nearest integer, ties to even, for int8: adding 1.5 * 2**23 puts it in the lowest byte."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _with_sign(x, update):
    """`x * sign(update)`."""
    bits = (update.to(tl.uint32, bitcast=True) & 0x80000000) ^ x.to(tl.uint32, bitcast=True)
    return tl.where(update == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _encode(x, noise):
    """fp32 `[BLOCKS, 256]` -> integers `[BLOCKS, 256]` in the lowest byte, scales `[BLOCKS]`."""
    largest = tl.max(tl.abs(x), axis=1)
    is_zero = largest <= _SMALLEST
    inverse = tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.maximum(largest, _SMALLEST)) * _RANGE)
    return _round(x * inverse[:, None] + noise), tl.where(is_zero, 0.0, largest * _STEP)


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def _store(pointers, values, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit(do_not_specialize=["low", "high"])
def _gradient_kernel(
    x_ptr, codes_ptr, scales_ptr, squares_ptr, elements, low, high,
    ADD: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Encodes a dense gradient, or its sum with the encoded one, and computes the sum of squares of every block."""
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * _BLOCK)
    local = tl.arange(0, BLOCKS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = local < elements - first
    block = tl.arange(0, BLOCKS)
    whole = block * _BLOCK < elements - first
    first_block = tl.program_id(0) * BLOCKS
    codes_ptr += first
    scales_ptr += first_block
    x = _load(x_ptr + first + local, inside, EVEN).to(tl.float32)
    if ADD:
        before = _to_float(_load(codes_ptr + local, inside, EVEN))
        x = x + before * _load(scales_ptr + block, whole, EVEN)[:, None]
    square = tl.sum(x * x, axis=1)
    words = _words(first.to(tl.uint32) + local.to(tl.uint32), low, high)
    integers, scales = _encode(x, _dither(words, 0))
    scales = tl.where(square < float("inf"), scales, float("nan"))
    _store(codes_ptr + local, integers.to(tl.int8), inside, EVEN)
    _store(scales_ptr + block, scales, whole, EVEN)
    _store(squares_ptr + first_block + block, square, whole, EVEN)


@triton.jit(do_not_specialize=["low", "high"])
def _lion_kernel(
    w_ptr, ws_ptr, g_ptr, gs_ptr, m_ptr, ms_ptr, r_ptr, norm_ptr, skipped_ptr, elements, group_size,
    max_norm, lr, keep, beta1, rest1, beta2, rest2, low, high,
    ROUNDING: tl.constexpr, DROPPED: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Decodes, updates and encodes weight and momentum; if the norm is not finite, only counts the skipped step.

    Weights without scales are floating point, and their lowest `DROPPED` bits of fp32 are rounded off stochastically.
    If `ALIGNED`, a weight's groups are whole blocks.
    """
    norm = tl.load(norm_ptr)
    if norm < float("inf"):
        factor = tl.where(norm > max_norm, tl.div_rn(1.0, norm + 1e-6) * max_norm, 1.0)
        first = tl.program_id(0).to(tl.int64) * (BLOCKS * _BLOCK)
        first_block = tl.program_id(0) * BLOCKS
        local = tl.arange(0, BLOCKS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        inside = local < elements - first
        block = tl.arange(0, BLOCKS)
        whole = block * _BLOCK < elements - first
        words = _words(first.to(tl.uint32) + local.to(tl.uint32), low, high)

        g = _load(g_ptr + first + local, inside, EVEN)
        g = g.to(tl.float32) if gs_ptr is None else _to_float(g)
        m = _to_float(_load(m_ptr + first + local, inside, EVEN))
        w = _load(w_ptr + first + local, inside, EVEN)
        w = w.to(tl.float32) if ws_ptr is None else _to_float(w)
        m_scales = _load(ms_ptr + first_block + block, whole, EVEN)[:, None]
        g_scales = factor
        if gs_ptr is not None:
            g_scales = _load(gs_ptr + first_block + block, whole, EVEN)[:, None] * factor
        update = m * (m_scales * beta1) + g * (g_scales * rest1)
        m = m * (m_scales * beta2) + g * (g_scales * rest2)
        m_codes, m_scales = _encode(m, _dither(words, 1))
        _store(m_ptr + first + local, m_codes.to(tl.int8), inside, EVEN)
        _store(ms_ptr + first_block + block, m_scales, whole, EVEN)

        if ws_ptr is None:
            w = w * keep - _with_sign(tl.full((1, 1), lr, tl.float32), update)
            if DROPPED > 0:
                noise = (words & 0xFFFF) >> (16 - DROPPED)
                bits = (w.to(tl.uint32, bitcast=True) + noise) >> DROPPED << DROPPED
                w = tl.where(tl.abs(w) < float("inf"), bits.to(tl.float32, bitcast=True), w)
            _store(w_ptr + first + local, w.to(w_ptr.dtype.element_ty), inside, EVEN)
        else:
            if ALIGNED:
                group = (first_block + block) // (group_size // _BLOCK)
                step = tl.div_rn(1.0, _load(ws_ptr + group, whole, EVEN))[:, None] * lr
            else:
                group = first // group_size
                rest = (first - group * group_size).to(tl.int32)
                step = (
                    tl.div_rn(1.0, tl.load(ws_ptr + group + (rest + local) // group_size, mask=inside, other=1)) * lr
                )
            w = w * keep - _with_sign(step, update)
            if ROUNDING == _ERROR_FEEDBACK:
                w += _to_float(_load(r_ptr + first + local, inside, EVEN)) * 0.00390625
            exact = w
            noise = _dither(words, 0)
            if ROUNDING == _STOCHASTIC:
                w += noise
            codes = _round(tl.minimum(tl.maximum(w, -128.0), 127.0)).to(tl.int8)
            if ROUNDING == _ERROR_FEEDBACK:
                rest = tl.minimum(tl.maximum((exact - _to_float(codes)) * 256.0 + noise, -127.0), 127.0)
                _store(r_ptr + first + local, _round(rest).to(tl.int8), inside, EVEN)
            _store(w_ptr + first + local, codes, inside, EVEN)
    elif tl.program_id(0) == 0:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)


@triton.jit
def _decode_kernel(
    codes_ptr, scales_ptr, columns_ptr, values_ptr, out_ptr, width, groups, outliers,
    OUTLIERS: tl.constexpr, ONE_GROUP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Decodes a run of a row, then overwrites the weights that have outliers; `OUTLIERS` is a power of two."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (TILE * TILES)
    codes_ptr += row * width
    out_ptr += row * width
    scales_ptr += row * groups
    scale = tl.load(scales_ptr)
    for tile in tl.static_range(TILES):
        column = first + tile * TILE + tl.arange(0, TILE)
        inside = column < width
        codes = tl.load(codes_ptr + column, mask=inside, other=0).to(tl.float32)
        if ONE_GROUP:
            weight = codes * scale
        else:
            weight = codes * tl.load(scales_ptr + column // (width // groups), mask=inside, other=0)
        tl.store(out_ptr + column, weight.to(out_ptr.dtype.element_ty), mask=inside)
    if OUTLIERS > 0:
        number = tl.arange(0, OUTLIERS)
        exists = number < outliers
        column = tl.load(columns_ptr + row * outliers + number, mask=exists, other=0).to(tl.int32)
        exists = exists & (column >= first) & (column < first + TILE * TILES)
        codes = tl.load(codes_ptr + column, mask=exists, other=0).to(tl.float32)
        if not ONE_GROUP:
            scale = tl.load(scales_ptr + column // (width // groups), mask=exists, other=0)
        weight = codes * scale + tl.load(values_ptr + row * outliers + number, mask=exists, other=0)
        tl.debug_barrier()  # wait until the run above is written
        tl.store(out_ptr + column, weight.to(out_ptr.dtype.element_ty), mask=exists)


def _tiles(elements: int, warps: int = _WARPS) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the kernels' arguments for splitting elements over it."""
    blocks = 2 * warps
    tile = blocks * int8.BLOCK
    # to agree with other devices, every product must be rounded separately
    options = {"EVEN": elements % tile == 0, "BLOCKS": blocks, "num_warps": warps, "enable_fp_fusion": False}
    return (triton.cdiv(elements, tile),), options


@operators.encode_gradient.triton
def encode_gradient(x: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(int8.blocks_of(x.numel()), device=x.device)
    squares = torch.empty(int8.blocks_of(x.numel()), device=x.device)
    grid, options = _tiles(x.numel())
    _gradient_kernel[grid](x.contiguous(), codes, scales, squares, x.numel(), *key_words(key), ADD=False, **options)
    return codes, scales, squares


@operators.accumulate_gradient.triton
def accumulate_gradient(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, key: int) -> torch.Tensor:
    squares = torch.empty(scales.shape, device=x.device)
    grid, options = _tiles(x.numel())
    _gradient_kernel[grid](x.contiguous(), codes, scales, squares, x.numel(), *key_words(key), ADD=True, **options)
    return squares


@operators.decode_weight.triton
def decode_weight(weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor:
    codes, scales, columns, values = weight
    rows, width = codes.shape
    outliers = 0 if columns is None else columns.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=codes.device)
    launcher(_decode_kernel, codes)[(rows, triton.cdiv(width, _TILE * _TILES))](
        codes, scales, columns, values, out, width, scales.shape[1], outliers,
        OUTLIERS=triton.next_power_of_2(outliers) if outliers else 0,
        ONE_GROUP=scales.shape[1] == 1,
        TILE=_TILE,
        TILES=_TILES,
        num_warps=_WARPS,
    )  # fmt: skip
    return out


@operators.int8_linear.triton
def int8_linear(x: torch.Tensor, weight: EncodedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, decode_weight(weight, x.dtype), bias)


@operators.int8_linear_grad_x.triton
def int8_linear_grad_x(dy: torch.Tensor, weight: EncodedWeight) -> torch.Tensor:
    return dy @ decode_weight(weight, dy.dtype)


@operators.lion_step.triton
def lion_step(step: LionStep) -> None:
    (
        weight, weight_scales, gradient, gradient_scales, momentum, momentum_scales, residual, norm, skipped,
        max_norm, lr, beta1, beta2, weight_decay, rounding, key,
    ) = step  # fmt: skip
    if momentum_scales is None:
        int8.lion_step(step)
        return
    group_size = 1 if weight_scales is None else weight.numel() // weight_scales.numel()
    dropped = 0 if rounding == int8.NEAREST else {torch.bfloat16: 16, torch.float16: 13}.get(weight.dtype, 0)
    grid, options = _tiles(weight.numel(), _WARPS if weight_scales is None else _WARPS_OF_INT8_LION)
    _lion_kernel[grid](
        weight, weight_scales, gradient.contiguous(), gradient_scales, momentum, momentum_scales, residual, norm,
        skipped, weight.numel(), group_size, max_norm, lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        *key_words(key),
        ROUNDING=rounding,
        DROPPED=dropped,
        ALIGNED=group_size % int8.BLOCK == 0,
        **options,
    )  # fmt: skip
