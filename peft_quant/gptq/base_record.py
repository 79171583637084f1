"""The record that an adapter keeps of its base, and the comparison of another model with it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .check import PackedTensors
from .checkpoint import Checkpoint
from .fingerprint import checkpoint_digest, fingerprint, in_parallel, is_sampled, layer_digest
from .layer import PackedFormat, tensor_format
from .zero_points import declared_format, stored_zero_offset


Layers = Mapping[str, tuple[PackedTensors, PackedFormat]]
"""The adapted layers of a base, without adapters, by name."""


def digests(layers: Layers, *, sampled: bool = False) -> dict[str, bytes]:
    """The digest of each layer: of all its values, or of samples."""

    def digest(layer: tuple[PackedTensors, PackedFormat]) -> bytes:
        tensors, packed = layer
        return layer_digest(tensors, packed.bits, packed.zero_offset, sampled=sampled)

    return dict(zip(layers, in_parallel(digest, layers.values())))


def stored_layers(checkpoint: Checkpoint, names: Mapping[str, str]) -> Layers:
    """Read layers of a checkpoint, given their names in its files.

    Raises:
        InvalidCheckpointError: one is damaged.
    """
    offset = stored_zero_offset(declared_format(checkpoint.quantization) or "gptq")
    layers = {}
    for name, stored in names.items():
        tensors = checkpoint.packed(stored)
        layers[name] = tensors, tensor_format(stored, tensors, offset)
    return layers


def describe_base(
    formats: Collection[PackedFormat],
    base_fingerprint: str,
    checkpoint_format: str | None,
    checkpoint: str | None,
) -> dict[str, Any]:
    """The record of its base that an adapter saves, stable as JSON.

    Args:
        formats: the formats of the adapted layers.
        base_fingerprint: the fingerprint of these layers.
        checkpoint_format: what the base's config declares.
        checkpoint: digest of the base's files, if the model is what they hold.
    """

    def summary(values: Iterable[Any]) -> Any:
        different = sorted(set(values))
        return different[0] if len(different) == 1 else different

    return {
        "bits": summary(packed.bits for packed in formats),
        "group_size": summary([packed.group_size for packed in formats if packed.groups > 1] or [-1]),
        "sym": all(packed.symmetric for packed in formats),
        "desc_act": any(packed.act_order for packed in formats),
        "checkpoint_format": checkpoint_format,
        "fingerprint": base_fingerprint,
        "checkpoint": checkpoint,
    }


def describe_checkpoint(checkpoint: Checkpoint, layers: Layers) -> dict[str, Any]:
    """[`describe_base`] for a checkpoint and the layers of it that an adapter changes."""
    declared = declared_format(checkpoint.quantization) or "gptq"
    return describe_base(
        [packed for _, packed in layers.values()],
        fingerprint(digests(layers).values()),
        declared,
        checkpoint_digest(checkpoint.files, stored_zero_offset(declared)),
    )


def difference(recorded: Mapping[str, Any], layers: Layers, found: Mapping[str, Any]) -> str | None:
    """How a model differs from the base that an adapter recorded; None if nothing known of both differs.

    Args:
        recorded: the adapter's record.
        layers: the model's layers that the adapter changes.
        found: the record that an adapter of the model would get.

    Raises:
        ValueError: the record has no fingerprint.
    """
    expected = recorded.get("fingerprint")
    if not isinstance(expected, str):
        raise ValueError(
            f"The adapter's base_quantization is {dict(recorded)!s:.500}, which has no fingerprint of its base: "
            "adapter_config.json was changed. Save or download the adapter again."
        )
    actual = found["fingerprint"]
    if is_sampled(expected):
        actual = fingerprint(digests(layers, sampled=True).values(), sampled=True)
    if expected != actual:
        wanted = {name: recorded.get(name) for name in found}
        return f"it expects {wanted}, this one is {dict(found)}"
    of_files = recorded.get("checkpoint"), found["checkpoint"]
    if None not in of_files and of_files[0] != of_files[1]:
        return (
            "the layers it changes are the same, but other tensors (embeddings, norms, biases, the head or further "
            f"packed layers) are not: it expects files with the digest {of_files[0]}, these have {of_files[1]}"
        )
    return None


def require_base(recorded: Mapping[str, Any], layers: Layers, found: Mapping[str, Any], base: str | None) -> None:
    """Check that a model is the base that an adapter recorded.

    Args:
        recorded: as in [`difference`].
        layers: as in [`difference`].
        found: as in [`difference`].
        base: the adapter's name for its base.

    Raises:
        ValueError: it is another base.
    """
    differs = difference(recorded, layers, found)
    if differs:
        raise ValueError(
            f"This adapter was trained on another base model: {differs}. Load the base it was trained on ({base}), "
            "unchanged."
        )
    if recorded.get("checkpoint") is not None and found["checkpoint"] is None:
        warnings.warn(
            "The files that this model was loaded from cannot be found, or its layers were changed since. Only the "
            f"layers that the adapter changes were compared with those of its base ({base}): embeddings, norms and "
            "the head may be others.",
            stacklevel=2,
        )
