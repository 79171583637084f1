"""Scales that training drove to the smallest or largest value that a checkpoint can store.

Rounding clamps them there, so the loss may look normal, but what the group of weights was worth is lost.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from operator import add
from weakref import WeakValueDictionary

import torch
from torch.distributed.tensor import DTensor, Replicate

from ...first_step import local, spread
from ...ops import newly_clamped
from .layer import PEQALayer


MAX_SHARE = 0.01
"""The share of a layer's scales from which on it matters that they are clamped."""

_SAMPLES = 256  # of each layer's scales


def count_clamped(layers: Mapping[str, PEQALayer]) -> dict[str, tuple[int, int]]:
    """The number of clamped scales and of all scales of each layer, with its active adapters."""
    counts, totals = [], {}
    with torch.no_grad():
        for name, layer in layers.items():
            adapters = layer.known_adapters(layer.active_adapters)
            if adapters:
                delta = reduce(add, (layer.peqa_scales[adapter].float() for adapter in adapters))
                base = _shard_like(layer.base_scales, delta).float()
                counts.append(newly_clamped(base + local(delta), base, *layer.scale_dtypes(adapters)).sum().cpu())
                totals[name] = base.numel()
    return {name: (int(count), total) for count, (name, total) in zip(counts, totals.items())}


def describe_clamped(counts: Mapping[str, tuple[int, int]]) -> str | None:
    """Words on clamped scales, or None if their share is below `MAX_SHARE` in every layer.

    Args:
        counts: the number of clamped scales and of all, by layer.
    """
    shares = {name: clamped / total for name, (clamped, total) in counts.items() if total}
    worst = max(shares, key=shares.__getitem__, default=None)
    if worst is None or shares[worst] < MAX_SHARE:
        return None
    clamped, total = (sum(column) for column in zip(*counts.values()))
    return (
        f"{clamped:,} of {total:,} scales ({clamped / total:.1%}) have reached the smallest or largest value that a "
        f"checkpoint can store, and {shares[worst]:.0%} of those of {worst}"
    )


class ClampedScales:
    """Warns as soon as training drives scales to the limits of their dtype, and again when their number has doubled.

    Between steps, a sample of each layer's scales is looked at, and all of them if more of the sample are clamped.

    Args:
        layers: the adapted layers, by name.
    """

    def __init__(self, layers: Mapping[str, PEQALayer]) -> None:
        self._layers = WeakValueDictionary(layers)  # `unload` must free them
        self._base: dict[str, torch.Tensor] = {}  # samples of scales that do not change
        self._suspects = 0.0

    @torch.no_grad()
    def suspects(self) -> torch.Tensor | None:
        """The number of clamped scales in the sample."""
        parts = defaultdict(list)
        for name, layer in self._layers.items():
            adapters = layer.known_adapters(layer.active_adapters)
            if adapters:
                deltas = [layer.peqa_scales[adapter] for adapter in adapters]
                if name not in self._base:
                    self._base[name] = spread(_shard_like(layer.base_scales, deltas[0]), _SAMPLES).float()
                delta = reduce(add, (spread(delta, _SAMPLES) for delta in deltas))
                parts[delta.device, layer.scale_dtypes(adapters)].append((self._base[name], delta))
        counts = []
        for (device, dtypes), pairs in parts.items():
            base, delta = (torch.cat(column) for column in zip(*pairs))
            base = base.to(device)
            counts.append(newly_clamped(base + delta, base, *dtypes).sum())
        return reduce(add, (count.to(counts[0].device) for count in counts)) if counts else None

    def report(self, suspects: float) -> None:
        if suspects < 2 * self._suspects or not suspects:
            return
        self._suspects = suspects
        found = describe_clamped(count_clamped(self._layers))
        if found:
            warnings.warn(
                f"After an optimizer step, {found}: the learning rate is too high. Start again with a lower one; "
                "PEQA's is absolute, and AdamW's steps are about as large.",
                stacklevel=4,
            )


def _shard_like(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The base scales that belong to this process's shard of the deltas."""
    if isinstance(delta, DTensor) and not isinstance(base, DTensor):
        mesh = delta.device_mesh
        whole = DTensor.from_local(base, mesh, [Replicate()] * mesh.ndim, run_check=False)
        base = whole.redistribute(placements=delta.placements)
    return local(base)
