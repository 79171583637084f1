"""int8 weights, gradients and momentum in plain PyTorch, for devices without a kernel.

Gradients and momentum are flat blocks of `BLOCK` elements with one fp32 scale each; weights have scales per row, or
per group of a row, and outliers. Everything is symmetric, `value = code * scale`, so zero stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from ..dispatch import compute_dtype
from ..rounding import dither, random_words, round_to_dtype
from . import operators
from .operators import BLOCK, ERROR_FEEDBACK, NEAREST, STOCHASTIC, EncodedWeight, LionStep, blocks_of


LARGEST = 127
_RUN = 1 << 18  # elements processed at a time (whole blocks), so that intermediates stay in the CPU's cache
# code of a block's largest element: just far enough below 127 that noise never rounds it to 128
RANGE = LARGEST - 2.0**-13
# a block whose largest element is below it counts as zero: the inverse of its scale would overflow
SMALLEST = 2.0**-100
_SCALE_OF_ZEROS = 2.0**-13
_ROOM = 1.125  # headroom for growth in a new scale


def _runs(elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield the elements and the blocks of each run."""
    for start in range(0, elements, _RUN):
        stop = min(start + _RUN, elements)
        yield slice(start, stop), slice(start // BLOCK, blocks_of(stop))


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    """Elements -> fp32 `[blocks, BLOCK]`; the last block is padded with zeros."""
    return F.pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _words(elements: slice, key: int, device: torch.device) -> torch.Tensor:
    """Random int32 words `[blocks, BLOCK]`, one per element."""
    stop = blocks_of(elements.stop) * BLOCK
    return random_words(elements.start, stop, key, device).view(-1, BLOCK)


def _encode(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 `[blocks, BLOCK]` -> integers `[blocks, BLOCK]` (fp32), scales `[blocks, 1]`."""
    largest = x.abs().amax(1, keepdim=True)
    is_zero = largest <= SMALLEST
    inverse = torch.where(is_zero, 0, largest.clamp(min=SMALLEST).reciprocal() * RANGE)
    codes = (x * inverse).add_(noise).round_()
    return codes, torch.where(is_zero, 0, largest * (1 / RANGE))


@operators.encode_gradient.eager
def encode_gradient(x: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(blocks_of(x.numel()), device=x.device)
    squares = torch.empty_like(scales)
    _write_gradient(codes, scales, squares, x, key, add=False)
    return codes, scales, squares


@operators.accumulate_gradient.eager
def accumulate_gradient(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, key: int) -> torch.Tensor:
    squares = torch.empty_like(scales)
    _write_gradient(codes, scales, squares, x, key, add=True)
    return squares


def _write_gradient(
    codes: torch.Tensor, scales: torch.Tensor, squares: torch.Tensor, x: torch.Tensor, key: int, add: bool
) -> None:
    codes, x = codes.view(-1), x.reshape(-1)
    for run, blocks in _runs(x.numel()):
        values = _in_blocks(x[run])
        if add:
            values = values + _in_blocks(codes[run]) * scales[blocks, None]
        squares[blocks] = values.square().sum(1)
        integers, new_scales = _encode(values, dither(_words(run, key, x.device), 0))
        codes[run] = integers.view(-1)[: run.stop - run.start].to(torch.int8)
        # a NaN scale keeps an overflowed block non-finite when more is added
        scales[blocks] = torch.where(squares[blocks] < torch.inf, new_scales[:, 0], torch.nan)


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode gradients or momentum to fp32, in the shape of `codes`."""
    values = _in_blocks(codes.reshape(-1)) * scales[:, None]
    return values.view(-1)[: codes.numel()].view(codes.shape)


def encode_weight(weight: torch.Tensor, outliers: int, groups: int = 1) -> EncodedWeight:
    """Encode a finite weight `[N, K]` by round-to-nearest, with scales `[N, groups]` and outliers `[N, outliers]`.

    The outliers, if any, are the largest magnitudes of each row, and their codes are 0. A group of zeros gets the mean
    scale of the other groups.
    """
    rest, columns, values = _without_outliers(weight.float(), outliers)
    scales = rest.view(len(rest), groups, -1).abs().amax(2) * (1 / LARGEST)
    empty = scales <= SMALLEST
    mean = scales.sum() / (~empty).sum().clamp(min=1)
    scales = _as_fp16_has_them(torch.where(empty, torch.where(mean > 0, mean, _SCALE_OF_ZEROS), scales))
    return EncodedWeight(_codes(rest, scales, None), scales, columns, values)


def refresh_weight(encoded: EncodedWeight, key: int) -> None:
    """Recompute outliers, and scales of groups whose codes reach the edge or use less than half of their range.

    In place, a run of rows at a time. Weights whose scale stays keep their codes; all others are rounded
    stochastically.
    """
    width = encoded.codes.shape[1]
    step = max(1, _RUN // width)
    for start in range(0, len(encoded.codes), step):
        rows = slice(start, start + step)
        parts: Any = [None if part is None else part[rows] for part in encoded]
        weight = decode_weight(EncodedWeight(*parts), torch.float32)
        rest, *outliers = _without_outliers(weight, 0 if encoded.columns is None else encoded.columns.shape[1])
        before = parts[1]
        largest = rest.view(*before.shape, -1).abs().amax(2)
        share = largest / before.abs()
        misfit = (share > LARGEST - 0.5) | ((share < LARGEST / 2) & (largest > SMALLEST))
        after = torch.where(misfit, _as_fp16_has_them(largest * (_ROOM / LARGEST)), before)
        noise = dither(random_words(start * width, start * width + weight.numel(), key, weight.device), 0)
        for part, new in zip(parts, (_codes(rest, after, noise.view_as(rest)), after, *outliers)):
            if part is not None:
                part.copy_(new)


def _as_fp16_has_them(scales: torch.Tensor) -> torch.Tensor:
    """Scales rounded to fp16, as GPTQ checkpoints store them, unless they are outside its normal range."""
    rounded = scales.half().float()
    return torch.where((scales >= 2.0**-14) & rounded.isfinite(), rounded, scales)


def _without_outliers(
    weight: torch.Tensor, outliers: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if not outliers:
        return weight, None, None
    columns = weight.abs().topk(outliers, dim=1, sorted=False).indices.sort(dim=1).values
    values = weight.gather(1, columns)
    dtype = torch.int16 if weight.shape[1] <= 1 << 15 else torch.int32
    return weight.scatter(1, columns, 0), columns.to(dtype), values


def _codes(weight: torch.Tensor, scales: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    codes = (weight.view(*scales.shape, -1) / scales[:, :, None]).view(weight.shape)
    if noise is not None:
        # dividing a decoded value by its own scale leaves a rounding error, which noise could turn into a whole step
        whole = codes.round()
        codes = torch.where((codes - whole).abs() < 2.0**-12, whole, codes) + noise
    return codes.round().clamp_(-LARGEST, LARGEST).to(torch.int8)


@operators.decode_weight.eager
def decode_weight(weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor:
    codes, scales, columns, values = weight
    rows, groups = scales.shape
    dense = (codes.view(rows, groups, -1) * scales[:, :, None]).view(codes.shape)
    if columns is not None and values is not None:
        dense.scatter_add_(1, columns.long(), values)
    return dense.to(dtype)


@operators.int8_linear.eager
def int8_linear(x: torch.Tensor, weight: EncodedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), decode_weight(weight, dtype), bias).to(x.dtype)


@operators.int8_linear_grad_x.eager
def int8_linear_grad_x(dy: torch.Tensor, weight: EncodedWeight) -> torch.Tensor:
    dtype = compute_dtype(dy)
    return (dy.to(dtype) @ decode_weight(weight, dtype)).to(dy.dtype)


def random_residual(codes: torch.Tensor, key: int) -> torch.Tensor:
    """Initial residuals for error feedback, uniform, so that codes move from the first step as they do later."""
    residual = torch.empty_like(codes)
    if codes.is_meta:
        return residual
    for run, _ in _runs(codes.numel()):
        words = random_words(run.start, run.stop, key, codes.device)
        residual.view(-1)[run] = (words >> 24).clamp_(min=-LARGEST).to(torch.int8)
    return residual


@operators.lion_step.eager
def lion_step(step: LionStep) -> None:
    (
        weight, weight_scales, gradient, gradient_scales, momentum, momentum_scales, residual, norm, skipped,
        max_norm, lr, beta1, beta2, weight_decay, rounding, key,
    ) = step  # fmt: skip
    if not norm.isfinite():
        skipped += 1
        return
    factor = torch.where(norm > max_norm, (norm + 1e-6).reciprocal() * max_norm, 1)
    group_size = 1 if weight_scales is None else weight.numel() // weight_scales.numel()
    flat: Any = [None if t is None else t.view(-1) for t in (weight, weight_scales, momentum, residual)]
    weight, scales, momentum, rest = flat
    gradient = gradient.reshape(-1)
    keep = 1 - lr * weight_decay

    for run, blocks in _runs(len(weight)):
        count = run.stop - run.start
        words = _words(run, key, weight.device)
        g = _in_blocks(gradient[run])
        g_scales = factor if gradient_scales is None else gradient_scales[blocks, None] * factor
        m = _in_blocks(momentum[run])
        m_scales = None if momentum_scales is None else momentum_scales[blocks, None]
        b1, b2 = (beta1, beta2) if m_scales is None else (beta1 * m_scales, beta2 * m_scales)
        sign = (m * b1 + g * ((1 - beta1) * g_scales)).sign_().view(-1)[:count]
        m = m * b2 + g * ((1 - beta2) * g_scales)

        w = weight[run]
        if scales is None:
            new = w.float() * keep - lr * sign
            new = new.to(w.dtype) if rounding == NEAREST else round_to_dtype(new, w.dtype, words.view(-1)[:count])
        else:
            first = run.start // group_size
            steps = scales[first : -(-run.stop // group_size)].reciprocal() * lr
            steps = steps.repeat_interleave(group_size)[run.start - first * group_size :][:count]
            exact = w.float() * keep - steps * sign
            noise = dither(words, 0).view(-1)[:count]
            if rounding == ERROR_FEEDBACK:
                exact += rest[run].float() * 2.0**-8
            new = (exact + noise if rounding == STOCHASTIC else exact).round().clamp_(-128, LARGEST)
            if rounding == ERROR_FEEDBACK:
                left = ((exact - new) * 2.0**8 + noise).clamp_(-LARGEST, LARGEST)
                rest[run] = left.round_().to(torch.int8)
        weight[run] = new.to(w.dtype)
        if momentum_scales is None:
            momentum[run] = m.view(-1)[:count]
        else:
            integers, new_scales = _encode(m, dither(words, 1))
            momentum[run] = integers.view(-1)[:count].to(torch.int8)
            momentum_scales[blocks] = new_scales[:, 0]
