"""int8 weights in files: the parts of a layer's `weight` lie beside its `bias`, as `codes`, `scales` and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..gptq.check import InvalidCheckpointError
from ..gptq.checkpoint import read_tensors
from .weight import Int8Weight


PARTS = ("codes", "scales", "outlier_columns", "outlier_values")


def flatten(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of plain tensors, in which tied int8 weights are once."""
    flat: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Int8Weight):
            flat[name] = tensor
            continue
        if tensor.codes.data_ptr() in seen:
            continue
        seen.add(tensor.codes.data_ptr())
        layer = name.rpartition(".")[0]
        for part, value in tensor.parts.items():
            flat[f"{layer}.{part}" if layer else part] = value
    return flat


def check_checkpoint(files: Iterable[str | Path], expected: Mapping[str, tuple[int, int]]) -> None:
    """Check an int8 checkpoint before anything of it is loaded.

    Args:
        files: its safetensors files.
        expected: shape of each int8 weight that the model's policy asks for, by the name of its module; of tied
            weights, one suffices.

    Raises:
        InvalidCheckpointError: a file is truncated, parts are missing, contradict each other or hold values out of
            range, or the layers in int8 are others.
    """
    shards = {name: tensor.file for name, tensor in read_tensors(files).items()}
    found = {name.rpartition(".")[0] for name in shards if name.rpartition(".")[2] == "codes"}
    unasked = sorted(found - expected.keys())
    if unasked:
        raise InvalidCheckpointError(
            f"The checkpoint has {len(unasked)} weights in int8, first {unasked[0]}, that the policy in its "
            "config.json leaves in float: it was put together from two, or the quantization config was changed. Save "
            "it again."
        )
    floats = sorted(name for name in expected.keys() - found if f"{name}.weight" in shards)
    if floats:
        raise InvalidCheckpointError(
            f"The checkpoint has {len(floats)} weights in float, first {floats[0]}, that the policy in its "
            "config.json puts in int8: it was put together from two, or the quantization config was changed. Save it "
            "again."
        )
    for name in sorted(found):
        _check_weight(name, shards, expected[name])


def _check_weight(name: str, shards: Mapping[str, Path], shape: tuple[int, int]) -> None:
    parts: dict[str, Any] = {}
    for part in PARTS:
        if f"{name}.{part}" in shards:
            with safe_open(shards[f"{name}.{part}"], framework="pt") as file:
                parts[part] = file.get_tensor(f"{name}.{part}")
    try:
        if parts["codes"].shape != shape:
            raise ValueError(f"codes have shape {tuple(parts['codes'].shape)}, the model's weight {shape}.")
        if "scales" not in parts:
            raise ValueError("it has codes and no scales.")
        Int8Weight.from_parts(**parts)
    except ValueError as error:
        raise InvalidCheckpointError(
            f"{name} is not a valid int8 weight: {error} The checkpoint is damaged or for another model; copy or save "
            "it again."
        ) from error


def layout_difference(model: nn.Module, other: nn.Module) -> str | None:
    """What differs between two models in what is int8 and how; None if nothing does."""
    ours, theirs = (
        {name: weight for name, weight in whole.named_parameters() if isinstance(weight, Int8Weight)}
        for whole in (model, other)
    )
    for name in ours | theirs:
        here, there = (_describe(weights.get(name)) for weights in (ours, theirs))
        if here != there:
            return f"{name} is {here} in the model, {there} in the checkpoint"
    return None


def _describe(weight: Int8Weight | None) -> str:
    if weight is None:
        return "in float"
    outliers = 0 if weight.outlier_columns is None else weight.outlier_columns.shape[1]
    return f"int8 {tuple(weight.shape)} with {weight.scales.shape[1]} scales and {outliers} outliers a row"
