"""Rounding of trained scales to values that a checkpoint can store, and unbiased rounding of trained integers.

Stochastic rounding is nearest rounding of `x + d` with `d` uniform in (-1/2, 1/2), here one of 2**16 values around
zero: on average it gives `x`, up to 2**-17, and integers stay as they are. The randomness is a hash of an element's
index and a key, so that it depends on nothing else, is the same on every device and path, and needs no state.
"""

from __future__ import annotations

import torch


_WORD = (1 << 32) - 1
_WORD64 = (1 << 64) - 1
# the multipliers of lowbias32 (Wellons, 2018), as signed 32-bit numbers
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))


def random_key(*path: int) -> int:
    """A signed 64-bit key from integers such as a seed, a stream, a parameter's number and a step (splitmix64)."""
    state = 0
    for number in path:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD64
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


def key_words(key: int) -> tuple[int, int]:
    """The low and the high half of a key as signed 32-bit numbers."""
    low, high = key & _WORD, (key >> 32) & _WORD
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def random_words(start: int, stop: int, key: int, device: torch.device) -> torch.Tensor:
    """Random int32 words for the elements `start` to `stop`: lowbias32, XORing half the key before each product."""
    low, high = key_words(key)
    x = torch.arange(start, stop, dtype=torch.int32 if stop <= _WORD >> 1 else None, device=device).to(torch.int32)
    x.bitwise_xor_(low)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MULTIPLIERS[0])
    x.bitwise_xor_(high)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(MULTIPLIERS[1])
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def dither(words: torch.Tensor, half: int) -> torch.Tensor:
    """fp32 in (-1/2, 1/2) from the low (0) or the high (1) 16 bits of random words."""
    bits = (words >> 16 * half).bitwise_and_(0xFFFF)
    return bits.float().sub_(32767.5).mul_(2.0**-16)


def round_to_dtype(x: torch.Tensor, dtype: torch.dtype, words: torch.Tensor) -> torch.Tensor:
    """Round fp32 to bf16 or fp16 stochastically, by the low 16 bits of random words; fp32 stays as it is.

    Values below the normal range of fp16 are rounded to nearest.
    """
    if dtype == torch.float32:
        return x
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = (words & 0xFFFF) >> (16 - dropped)
    bits = x.contiguous().view(torch.int32).add(noise).bitwise_and_(-1 << dropped)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(dtype)


def round_scales(
    scales: torch.Tensor, base: torch.Tensor, storage: torch.dtype, serving: torch.dtype | None = None
) -> torch.Tensor:
    """Round fp32 scales `[G, N]` to the nearest values that survive storage (and serving) unchanged.

    Args:
        scales: the tuned scales.
        base: the scales they were tuned from, none of them zero, whose signs they keep.
        storage: dtype of `scales` in the checkpoint (fp16 in GPTQ).
        serving: dtype an engine converts the stored scales to, if that conversion must not change them either.

    Returns:
        A tensor of dtype `storage`. NaN stays NaN; a value that would round to zero or cross it becomes the value next
        to zero on the side of `base`.
    """
    info = torch.finfo(storage)
    smallest = info.tiny * info.eps
    if serving is not None:
        scales = scales.to(serving).float()
    signs = base.sign()
    return (scales * signs).clamp(smallest, info.max).mul(signs).to(storage)


def newly_clamped(
    scales: torch.Tensor, base: torch.Tensor, storage: torch.dtype, serving: torch.dtype | None = None
) -> torch.Tensor:
    """Where [`round_scales`], of the same arguments, gives the smallest or largest value of the dtype, a bool tensor.

    Scales that begin at these values do not count.
    """
    info = torch.finfo(storage)
    smallest = info.tiny * info.eps
    tuned, untuned = (round_scales(values.float(), base, storage, serving).abs() for values in (scales, base))
    return ((tuned <= smallest) | (tuned >= info.max)) & (untuned > smallest) & (untuned < info.max)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, base, storage, serving):
        return round_scales(scales, base, storage, serving).to(scales.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def round_scales_straight_through(
    scales: torch.Tensor, base: torch.Tensor, storage: torch.dtype, serving: torch.dtype | None = None
) -> torch.Tensor:
    """[`round_scales`] in the dtype of its input, with the identity as gradient.

    This is the straight-through estimator (Bengio et al., 2013, arXiv 1308.3432).
    """
    return _StraightThrough.apply(scales, base, storage, serving)
