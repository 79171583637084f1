"""Perplexity of a language model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm


@torch.no_grad()
def perplexity(
    model: Any, windows: torch.Tensor, *, batch_size: int = 4, description: str | None = "perplexity"
) -> float:
    """Per-token perplexity of a causal language model.

    The exponential of the mean cross entropy in fp32, over every token of every window except its first, which serves
    as context only. Training mode is left as it was.

    Args:
        model: a model that returns `logits` for `input_ids`, in the dtype to measure.
        windows: token ids, int64 `[number, size]`.
        batch_size: windows per forward pass.
        description: label of the progress bar; None for no bar.

    Returns:
        The perplexity; infinite or NaN if the logits are not finite.

    Raises:
        ValueError: no windows, or windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise ValueError(f"The windows are of shape {list(windows.shape)}: give [number, size], two tokens or more.")
    training = model.training
    model.eval()
    total = 0.0
    try:
        for batch in tqdm(windows.split(batch_size), desc=description, unit="batch", disable=description is None):
            tokens = batch.to(model.device)
            for row, targets in zip(model(input_ids=tokens, use_cache=False).logits, tokens):
                total += functional.cross_entropy(row[:-1].float(), targets[1:], reduction="sum").item()
    finally:
        model.train(training)
    mean = total / windows[:, 1:].numel()
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else mean * math.inf
