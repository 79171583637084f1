"""Invariants of packed tensors. Checkpoints are untrusted input: nothing is decoded before these hold."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops.packed.packing import SUPPORTED_BITS, WORD_BITS
from ..reading import InvalidFileError


class PackedTensors(NamedTuple):
    """The tensors of a GPTQ layer: `K` in-features, `N` out-features, `G` groups."""

    qweight: torch.Tensor
    """int32 `[K * bits / 32, N]`"""
    qzeros: torch.Tensor
    """int32 `[G, N * bits / 32]`"""
    scales: torch.Tensor
    """floating point `[G, N]`, finite and not zero; of either sign"""
    g_idx: torch.Tensor
    """int32 `[K]`, with every value of `0 .. G - 1` equally often, except the last, which may be rarer"""


class InvalidCheckpointError(InvalidFileError):
    """A checkpoint whose files are damaged or incomplete, or whose packed tensors are not a valid GPTQ layer."""


def check_packed_tensors(name: str, tensors: PackedTensors) -> int:
    """Check one layer's tensors against each other, and return its bit width as their shapes determine it.

    Args:
        name: the layer's name in errors.
        tensors: the layer's tensors.

    Raises:
        InvalidCheckpointError: naming the tensor, its value and the rule it breaks.
    """

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InvalidCheckpointError(
                f"{name} is not a valid GPTQ layer: {message}. The checkpoint is damaged or was written by a kernel "
                "in its own layout; download it again or quantize the model again."
            )

    for tensor_name, tensor, dimensions in zip(tensors._fields, tensors, (2, 2, 2, 1)):
        shape = tuple(tensor.shape)
        require(tensor.ndim == dimensions, f"{tensor_name} has shape {shape}, not {dimensions} dimensions")
    qweight, qzeros, scales, g_idx = tensors
    for tensor_name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        require(tensor.dtype == torch.int32, f"{tensor_name} has dtype {tensor.dtype}, only int32 words are supported")
    is_float = scales.is_floating_point() and scales.dtype.itemsize > 1
    require(is_float, f"scales have dtype {scales.dtype}, not a floating point one of 16 bits or more")
    require(g_idx.dtype in (torch.int32, torch.int64), f"g_idx has dtype {g_idx.dtype}, not int32")

    rows, (words, columns), groups = g_idx.numel(), qweight.shape, scales.shape[0]
    bits = words * WORD_BITS // rows if rows else 0
    require(
        bits in SUPPORTED_BITS and words * WORD_BITS == rows * bits,
        f"qweight has {words} rows of 32-bit words for the {rows} in-features of g_idx, which is not 2, 3, 4 or 8 "
        "bits a weight",
    )
    require(columns > 0, "qweight has no columns")
    require(scales.shape[1] == columns, f"scales have shape {tuple(scales.shape)}, expected {columns} columns")
    require(
        qzeros.shape == (groups, columns * bits // WORD_BITS) and columns * bits % WORD_BITS == 0,
        f"qzeros have shape {tuple(qzeros.shape)}, expected {(groups, columns * bits / WORD_BITS)} for {groups} "
        f"groups of {columns} zero points in {bits} bits",
    )
    if scales.device.type == "meta":
        return bits
    low, high = int(g_idx.min()), int(g_idx.max())
    require(low >= 0 and high < groups, f"g_idx ranges over {low}..{high}, but there are {groups} groups")
    members = torch.bincount(g_idx.long(), minlength=groups).tolist()
    used = sum(count > 0 for count in members)
    require(used == groups, f"g_idx uses {used} of the {groups} groups")
    require(
        all(count == members[0] for count in members[:-1]) and members[-1] <= members[0],
        f"g_idx puts {min(members)} to {max(members)} rows into a group, but only the last one may be smaller",
    )
    for kind, where in (("NaN or infinite", ~torch.isfinite(scales)), ("zero", scales == 0)):
        count = int(where.sum())
        require(count == 0, f"{count} of {scales.numel()} scales are {kind}")
    return bits
