"""The files that a model in memory was loaded from, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import PreTrainedModel

from ..reading import InvalidFileError
from .check import InvalidCheckpointError, PackedTensors
from .checkpoint import Checkpoint
from .fingerprint import checkpoint_digest, layer_digest
from .layer import PackedFormat, is_packed
from .names import loaded_names, missing_layers
from .zero_points import checkpoint_format, stored_zero_offset


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The GPTQ layers of a model, by their names without adapters."""
    return {name.removesuffix(".base_layer"): module for name, module in model.named_modules() if is_packed(module)}


def require_whole(model: nn.Module) -> None:
    """Check that a model has the same packed layers as the files it was loaded from, if they still exist.

    Raises:
        InvalidCheckpointError: some layers differ, and so have random weights.
    """
    packed = packed_modules(model)
    source = Source.of(model, packed.keys())
    if source is not None:
        source.require_whole(packed.keys())


@dataclass(frozen=True)
class Source:
    """The checkpoint that a model was loaded from.

    Attributes:
        model: the model, with or without adapters.
        checkpoint: its files.
        layers: names of the packed layers in the files, by their names in the model.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    layers: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, packed: Collection[str]) -> Source | None:
        """The source of a model; None if its files cannot be found any more, or have no packed layer.

        Args:
            model: the model, with or without adapters.
            packed: the names of its packed layers, without adapters.
        """
        checkpoint = _checkpoint_of(model) if isinstance(model, PreTrainedModel) else None
        if checkpoint is None or not checkpoint.packed_layers or not isinstance(model, PreTrainedModel):
            return None
        known = {name.replace(".base_layer", "") for name, _ in model.named_modules()} | set(packed)
        names = loaded_names(checkpoint.packed_layers, model, known)
        return cls(model, checkpoint, {name: stored for stored, name in names.items()})

    def require_whole(self, packed: Collection[str]) -> None:
        """The function of this name, given the names of the model's packed layers."""
        left_out = missing_layers(self.model, self.layers, packed)
        made_up = [name for name in packed if name not in self.layers and f"{name}.weight" in self.checkpoint.tensors]
        for names, what in ((left_out, "packed in the files and not"), (made_up, "in float in the files and packed")):
            if names:
                listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise InvalidCheckpointError(
                    f"{type(self.model).__name__} was not loaded whole: {len(names)} layers are {what} in the model, "
                    f"where their weights are random ({listed}). Load it again after `import peft_quant`, with "
                    '`quantization_config=GPTQConfig(bits=..., backend="gptq_torch")`: then what the files have '
                    "packed is packed in the model."
                )

    def require_own_scales(self, layers: Mapping[str, Any]) -> None:
        """Check that scales have the dtype they have in the files, as a cast would have rounded them.

        Args:
            layers: packed layers of the model, by their names without adapters.

        Raises:
            ValueError: they were cast, and so rounded, since the model was loaded.
        """
        for name, layer in layers.items():
            stored = self.checkpoint.tensors.get(f"{self.layers.get(name)}.scales")
            scales = getattr(layer, "scales", None)
            if stored is not None and isinstance(scales, torch.Tensor) and scales.dtype != stored.torch_dtype:
                raise ValueError(
                    f"The scales of {name} are {scales.dtype} in memory and {stored.torch_dtype} in "
                    f"{self.checkpoint.directory}: the model was cast after it was loaded, which rounds them. Load it "
                    "in the dtype to compute in, `from_pretrained(..., dtype=...)`, which leaves scales as they are, "
                    "or cast it with the adapter on."
                )

    def digest(self, layers: Mapping[str, tuple[PackedTensors, PackedFormat]]) -> str | None:
        """SHA-256 of every tensor of the checkpoint; None if the given layers of the model differ from its files.

        Layers are compared by samples. They differ if an adapter was merged into the model after loading.
        """
        zero_offset = stored_zero_offset(checkpoint_format(self.model) or "gptq")
        for name, (tensors, packed) in layers.items():
            if name not in self.layers:
                return None
            stored = self.checkpoint.packed(self.layers[name])
            samples = layer_digest(stored, packed.bits, zero_offset, sampled=True)
            if samples != layer_digest(tensors, packed.bits, packed.zero_offset, sampled=True):
                return None
        return checkpoint_digest(self.checkpoint.files, zero_offset)


def _checkpoint_of(model: PreTrainedModel) -> Checkpoint | None:
    files = getattr(getattr(model, "hf_quantizer", None), "checkpoint_files", ())
    try:
        if files:
            return Checkpoint.of_files(files)
        directory = _directory_of(model.config)
        return None if directory is None else Checkpoint.open(directory)
    except (OSError, InvalidFileError):  # moved or changed since
        return None


def _directory_of(config: Any) -> Path | None:
    name = getattr(config, "_name_or_path", None)
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None
