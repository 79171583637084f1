"""int8 weights in files, which store `codes`, `scales` and outliers instead of a layer's `weight`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import WeightTransform

from ..gptq.check import InvalidCheckpointError
from ..gptq.checkpoint import StoredTensor, read_tensors
from .names import parameters_of
from .weight import Int8Weight


if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("codes", "scales", "outlier_columns", "outlier_values")
PATTERNS = {rf"\.{part}$": part for part in PARTS}
"""Parts of a weight, by name pattern as in transformers' conversions."""


def part_names(name: str) -> list[str]:
    """The names of a weight's parts in a checkpoint."""
    layer = name.rpartition(".")[0]
    return [f"{layer}.{part}" if layer else part for part in PARTS]


def flatten(state_dict: Mapping[str, torch.Tensor], tied: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """A state dict of plain tensors, with each int8 weight under one name only.

    Args:
        state_dict: state dict of a model.
        tied: names that the model ties to others; used only for weights that have no other name.
    """
    flat: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in sorted(state_dict, key=lambda name: name in tied):
        tensor = state_dict[name]
        if not isinstance(tensor, Int8Weight):
            flat[name] = tensor
            continue
        if tensor.codes.data_ptr() in seen:
            continue
        seen.add(tensor.codes.data_ptr())
        flat |= {part: value for part, value in zip(part_names(name), tensor._tensors()) if value is not None}
    return flat


def check_checkpoint(
    files: Iterable[str | Path], model: PreTrainedModel, conversions: Iterable[WeightTransform], int8: Collection[str]
) -> None:
    """Check an int8 checkpoint before it is loaded. Tensors that the model does not have are ignored.

    Args:
        files: safetensors files of the checkpoint.
        model: the model to load it into, without values.
        conversions: transformers' conversions from tensors in the files to parameters.
        int8: the parameters that the policy puts in int8, whether or not the files have them.

    Raises:
        InvalidCheckpointError: a file is truncated; parts are missing, contradict each other or hold values out of
            range; a weight is stored twice; or parameters outside the policy are in int8.
    """
    stored = read_tensors(files)
    expected = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, dict[str, str]] = defaultdict(dict)  # names of the stored parts, by weight
    floats: dict[str, str] = {}
    for name, (parameters, pattern) in parameters_of(stored, model, conversions).items():
        for parameter in expected.keys() & parameters:
            found, key = (weights[parameter], PATTERNS[pattern]) if pattern in PATTERNS else (floats, parameter)
            if pattern in PATTERNS and key in found:
                raise InvalidCheckpointError(_twice(parameter, found[key], name))
            found[key] = name
    _check_policy(model, "in int8", "leaves in float", weights.keys() - int8)
    _check_policy(model, "in float", "puts in int8", (floats.keys() & int8) - weights.keys())
    for parameter, parts in sorted(weights.items()):
        if parameter in floats:
            raise InvalidCheckpointError(_twice(parameter, *parts.values(), floats[parameter]))
        _check_weight(parameter, parts, stored, tuple(expected[parameter].shape))


def _check_policy(model: PreTrainedModel, found: str, expected: str, parameters: Collection[str]) -> None:
    if parameters:
        raise InvalidCheckpointError(
            f"The checkpoint has {len(parameters)} weights {found}, first {min(parameters).removesuffix('.weight')}, "
            f"that the quantization config in its config.json {expected} in a {type(model).__name__}: the two were "
            "not saved together, or one of them was changed since. Save the checkpoint again, or restore the file "
            "that was changed."
        )


def _twice(parameter: str, *names: str) -> str:
    return (
        f"{parameter} is in the checkpoint more than once, as {', '.join(names)}: files of several checkpoints lie in "
        "one directory, or it was put together from several. Save it again, to a directory of its own."
    )


def _check_weight(
    parameter: str, names: Mapping[str, str], stored: Mapping[str, StoredTensor], shape: tuple[int, ...]
) -> None:
    parts: dict[str, Any] = {part: stored[name].read() for part, name in names.items()}
    try:
        for needed, other in (("codes", "scales"), ("scales", "codes")):
            if needed not in parts:
                raise ValueError(f"it has {other if other in parts else 'outliers'} and no {needed}.")
        if parts["codes"].shape != shape:
            raise ValueError(f"codes have shape {tuple(parts['codes'].shape)}, the model's weight {shape}.")
        Int8Weight.from_parts(**parts)
    except ValueError as error:
        raise InvalidCheckpointError(
            f"{parameter.removesuffix('.weight')} is not a valid int8 weight: {error} The checkpoint is damaged or "
            "for another model; copy or save it again."
        ) from error


def loading_difference(found: Mapping[str, Collection[Any]]) -> str | None:
    """The first kind of mismatch in transformers' loading info, as text; None if there is none."""
    for what, names in found.items():
        if names:
            return f"{len(names)} {what.replace('_', ' ')}, first {min(map(str, names))}"
    return None


def layout_difference(model: nn.Module, other: nn.Module) -> str | None:
    """The first weight that is int8 in one model and float in the other; None if there is none."""
    ours, theirs = (
        {name: weight for name, weight in each.named_parameters() if isinstance(weight, Int8Weight)}
        for each in (model, other)
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
