"""Rounding of trained scales to what a checkpoint can store."""

from __future__ import annotations

import torch


def round_scales(scales: torch.Tensor, storage: torch.dtype, serving: torch.dtype | None = None) -> torch.Tensor:
    """Round fp32 scales `[G, N]` to the nearest values that survive storage (and serving) unchanged, kept positive.

    Args:
        storage: dtype of `scales` in the checkpoint (fp16 in GPTQ).
        serving: dtype an engine converts the stored scales to, if it is to change nothing either.

    Returns:
        A tensor of dtype `storage`. NaN stays NaN; values at or below zero become the smallest positive one.
    """
    info = torch.finfo(storage)
    smallest = info.tiny * info.eps
    if serving is not None:
        scales = scales.to(serving).float()
    return scales.clamp(smallest, info.max).to(storage)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, storage, serving):
        return round_scales(scales, storage, serving).to(scales.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def round_scales_straight_through(
    scales: torch.Tensor, storage: torch.dtype, serving: torch.dtype | None = None
) -> torch.Tensor:
    """[`round_scales`] in the dtype of its input, with the identity as gradient (straight-through estimator, Bengio et
    al., 2013, arXiv 1308.3432)."""
    return _StraightThrough.apply(scales, storage, serving)
