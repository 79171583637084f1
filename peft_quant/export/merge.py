"""Merging a PEQA adapter into a GPTQ checkpoint, without loading the model."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..files import new_directory, refuse_existing, require_space
from ..gptq.base_record import describe_checkpoint, require_base, stored_layers
from ..gptq.checkpoint import Checkpoint
from ..gptq.names import StoredNames
from ..gptq.zero_points import declared_format
from ..module_names import SCALE_DELTAS, split_adapter_key
from ..ops import newly_clamped, round_scales
from ..reading import regular_files
from ..tuners.peqa.clamped import describe_clamped
from ..tuners.peqa.config import PEQAConfig
from ..tuners.saved import load_config, load_weights, require_trained
from .card import FACTS, README, best_effort, inherited_metadata, update_card


_MERGE_IN_MEMORY = (
    "Merge in memory instead, which writes such a model as a whole: "
    "`PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(out)`."
)


@dataclass(frozen=True)
class Merge:
    """A merge that was checked but not yet written.

    Attributes:
        checkpoint: the base.
        config: configuration of the adapter.
        deltas: scale deltas, by the name of the scales in the base.
        others: tensors of `modules_to_save`, by their name in the base.
        out: directory to write.
        bases: names of the base, from the adapter's configuration and from the caller.
    """

    checkpoint: Checkpoint
    config: PEQAConfig
    deltas: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    out: Path
    bases: tuple[str | None, ...]

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of each file to write, by its path within `out`."""
        directory = self.checkpoint.directory
        return {file.relative_to(directory).as_posix(): file.stat().st_size for file in regular_files(directory)}

    def write(self) -> Path:
        """Write the merged checkpoint; it appears once it is complete.

        Raises:
            FileExistsError: `out` exists.
        """
        with new_directory(self.out) as directory:
            self.checkpoint.copy_with(directory, {*self.deltas, *self.others}, self._replacement)
            for name in (README, FACTS):
                (directory / name).unlink(missing_ok=True)
            with best_effort(self.out):
                update_card(
                    directory,
                    bases=self.bases,
                    metadata=inherited_metadata(self.checkpoint.directory),
                    changed={*self.deltas, *self.others},
                )
        return self.out

    def _replacement(self, name: str, old: torch.Tensor) -> torch.Tensor:
        if name in self.others:
            new = self.others[name].to(old.dtype)
            if not new.isfinite().all():
                raise ValueError(
                    f"{name} was trained to {float(self.others[name].abs().max()):g}, which {old.dtype} of the base "
                    f"cannot hold. {_MERGE_IN_MEMORY}"
                )
            return new
        tuned = old.float() + self.deltas[name].float()
        return round_scales(tuned, old, old.dtype, self.config.serving_torch_dtype)


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_clamped_scales: bool = False,
) -> Path:
    """Write a copy of a GPTQ checkpoint with a PEQA adapter merged into its scales.

    Works on files, one tensor at a time: it needs neither a GPU nor a GPTQ package. All other tensors and files,
    `config.json` included, are copied byte for byte, except the model card and its facts, which describe the merged
    model. `model.merge_and_unload().save_pretrained(out)` writes the same tensors. `out` appears once it is complete.

    Args:
        base: directory or Hub id of the GPTQ checkpoint, in safetensors, that the adapter was trained on.
        adapter: directory or Hub id of the adapter.
        out: directory to write, which must not exist.
        revision: branch, tag or commit of `base`, if it is a Hub id.
        token: Hub token.
        allow_clamped_scales: merge even if the adapter drove 1 % of a layer's scales or more to the smallest or
            largest value that the checkpoint can store, as too high a learning rate does.

    Returns:
        The path of `out`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: `base` is a directory without a safetensors checkpoint.
        InvalidFileError: a file of the base or of the adapter is damaged; `InvalidCheckpointError` for a shard or a
            layer's packed tensor that is damaged or missing.
        OSError: there is not enough space for the merged checkpoint.
        ValueError: the adapter is not a PEQA adapter, holds NaN, tensors that it did not train or clamped scales, or
            was trained on another base; or the merged model needs another config.json or additional tensors, as with a
            new head, a resized vocabulary or trained tied embeddings. `merge_and_unload` supports those.
    """
    return plan_merge(
        base, adapter, out, revision=revision, token=token, allow_clamped_scales=allow_clamped_scales
    ).write()


def plan_merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_clamped_scales: bool = False,
) -> Merge:
    """Check everything that [`merge_checkpoint`] needs, without writing.

    Args and errors: as for [`merge_checkpoint`].
    """
    refuse_existing(out)
    config = load_config(adapter, token=token)
    if not isinstance(config, PEQAConfig):
        raise ValueError(
            f"{adapter} is a {config.peft_type.value} adapter. Only PEQA adapters merge into a GPTQ checkpoint: they "
            "change scales alone."
        )
    weights = load_weights(adapter, token=token)
    directory = base
    if not os.path.isdir(base):
        directory = snapshot_download(
            os.fspath(base), revision=revision, token=token, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]
        )
    checkpoint = Checkpoint.open(directory)
    _require_mergeable(checkpoint)
    keys = [split_adapter_key(key) for key in weights]
    layers = [name for name, parameter in keys if parameter == SCALE_DELTAS]
    others = [name for name, parameter in keys if not parameter]
    names = StoredNames(checkpoint, config.task_type)
    layer_names, other_names = names.layers(layers), names.tensors(others)

    def of_base(name: str) -> torch.Tensor | None:
        return checkpoint.tensor(other_names[name]) if name in other_names else None

    trained = require_trained(os.fspath(adapter), config, weights, of_base)
    others = [name for name in others if name in trained]
    _require_stored(checkpoint, config, layers, layer_names)
    _require_alone(checkpoint, others, other_names, names.ties() if others else {})
    deltas = {f"{layer_names[name]}.scales": trained[f"{name}.{SCALE_DELTAS}"] for name in layers}
    replaced = {other_names[name]: trained[name] for name in others}
    _require_shapes(checkpoint, config, {**deltas, **replaced})
    _require_base(checkpoint, config, layer_names)
    if not allow_clamped_scales:
        _refuse_clamped(checkpoint, config, deltas)
    plan = Merge(
        checkpoint, config, deltas, replaced, Path(out), (config.base_model_name_or_path, os.fspath(directory))
    )
    way_out = "Make room, or choose another directory"
    require_space(plan.out, sum(plan.files.values()), "The merged checkpoint", way_out)
    return plan


def _require_mergeable(checkpoint: Checkpoint) -> None:
    if declared_format(checkpoint.quantization) is None:
        raise ValueError(f"{checkpoint.directory} is not a GPTQ checkpoint: its config.json has no GPTQ quantization.")
    if checkpoint.unread:
        raise ValueError(
            f"{checkpoint.directory} has weights that `from_pretrained` does not read, "
            f"{', '.join(file.name for file in checkpoint.unread)}: the merged model would have them unmerged. Move "
            "them elsewhere."
        )


def _require_stored(checkpoint: Checkpoint, config: PEQAConfig, layers: list[str], found: dict[str, str]) -> None:
    missing = [name for name in layers if name not in found]
    if missing:
        raise ValueError(
            f"The adapter changes {len(missing)} layers, {missing[0]} first, that {checkpoint.directory} does not "
            f"have packed: it was trained on another base model, {config.base_model_name_or_path}."
        )
    for name in found.values():
        checkpoint.require_parts(name)


def _require_alone(checkpoint: Checkpoint, others: list[str], stored: dict[str, str], ties: dict[str, str]) -> None:
    """Check that each tensor of `modules_to_save` is in the files and not tied to another."""
    for name in others:
        if name not in stored:
            raise ValueError(
                f"The adapter trained {name}, which {checkpoint.directory} does not have. {_MERGE_IN_MEMORY}"
            )
        pair = next((pair for pair in ties.items() if name in pair), None)
        if pair is not None:
            raise ValueError(
                f"The adapter trained {name}, and in {checkpoint.directory} {pair[0]} is tied to {pair[1]}: it would "
                f"change both. {_MERGE_IN_MEMORY}"
            )


def _require_shapes(checkpoint: Checkpoint, config: PEQAConfig, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        if stored.shape == tensor.shape:
            continue
        found = f"The adapter's tensor for {name} has shape {tuple(tensor.shape)}, the base's {stored.shape}"
        if name.endswith(".scales"):
            raise ValueError(f"{found}: it was trained on another base model, {config.base_model_name_or_path}.")
        raise ValueError(f"{found}, as where a vocabulary was resized, which changes config.json. {_MERGE_IN_MEMORY}")


def _refuse_clamped(checkpoint: Checkpoint, config: PEQAConfig, deltas: dict[str, torch.Tensor]) -> None:
    counts = {}
    for name, delta in deltas.items():
        base = checkpoint.tensor(name)
        clamped = newly_clamped(base.float() + delta.float(), base, base.dtype, config.serving_torch_dtype)
        counts[name.removesuffix(".scales")] = int(clamped.sum()), clamped.numel()
    found = describe_clamped(counts)
    if found:
        raise ValueError(
            f"{found}: the learning rate was too high. Train again with a lower one, use an earlier checkpoint, or "
            "merge nevertheless with allow_clamped_scales=True (--allow-clamped-scales)."
        )


def _require_base(checkpoint: Checkpoint, config: PEQAConfig, names: dict[str, str]) -> None:
    layers = stored_layers(checkpoint, names)
    recorded: dict[str, Any] | None = config.base_quantization
    if recorded is not None:
        require_base(recorded, layers, describe_checkpoint(checkpoint, layers), config.base_model_name_or_path)
        return
    warnings.warn(
        f"The adapter does not record the base it was trained on: that it is {checkpoint.directory} was not checked.",
        stacklevel=4,
    )
