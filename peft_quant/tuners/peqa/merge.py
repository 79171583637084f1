"""Merging a PEQA adapter into a GPTQ checkpoint, on files alone."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils.save_and_load import load_peft_weights
from tqdm.auto import tqdm

from ...gptq import PackedTensors
from ...gptq.check import check_packed_tensors
from ...gptq.checkpoint import Checkpoint, new_directory, refuse_existing
from ...gptq.fingerprint import fingerprint, layer_digest
from ...gptq.zero_points import declared_format, stored_zero_offset
from ...ops import round_scales
from ...report.card import README, inherited_metadata, update_card
from .config import PEQAConfig
from .layer import check_finite


_KEY_PREFIX = "base_model.model."
_DELTA_SUFFIX = ".peqa_scales"


@dataclass(frozen=True)
class Merge:
    """A merge of which everything was checked and nothing is written.

    Attributes:
        checkpoint: the base.
        config: of the adapter.
        deltas: changes of scales, by the name of the scales in the base.
        others: tensors of `modules_to_save`, by their name in the base.
        out: directory to write.
        bases: what the base is called, by the adapter and by the caller.
    """

    checkpoint: Checkpoint
    config: PEQAConfig
    deltas: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    out: Path
    bases: tuple[str | None, ...]

    @property
    def files(self) -> dict[str, int]:
        """Bytes by the path of each file that is written, in `out`."""
        directory = self.checkpoint.directory
        return {
            file.relative_to(directory).as_posix(): file.stat().st_size
            for file in sorted(directory.rglob("*"))
            if file.is_file() and not file.relative_to(directory).parts[0].startswith(".")
        }

    def write(self) -> Path:
        """Write the merged checkpoint; it appears once it is complete.

        Raises:
            FileExistsError: `out` exists.
        """
        with new_directory(self.out) as directory:
            self.checkpoint.copy_with(directory, {*self.deltas, *self.others}, self._replacement)
            (directory / README).unlink(missing_ok=True)
            update_card(
                directory,
                bases=self.bases,
                metadata=inherited_metadata(self.checkpoint.directory),
                changed={*self.deltas, *self.others},
            )
        return self.out

    def _replacement(self, name: str, old: torch.Tensor) -> torch.Tensor:
        if name in self.others:
            return self.others[name].to(old.dtype)
        tuned = old.float() + self.deltas[name].float()
        return round_scales(tuned, old, old.dtype, self.config.serving_torch_dtype)


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Write a copy of a GPTQ checkpoint with a PEQA adapter merged into its scales.

    Works on files: needs neither a GPU nor a GPTQ package, and memory for one shard's tensor at a time. Every other
    tensor and file, `config.json` included, is byte-equal to the base, but for the model card, which is the merged
    model's own; the same tensors result from `model.merge_and_unload().save_pretrained(out)`. `out` appears once it is
    complete.

    Args:
        base: directory or Hub id of the GPTQ checkpoint the adapter was trained on, in safetensors.
        adapter: directory or Hub id of the adapter.
        out: directory to write, which must not exist.
        revision: branch, tag or commit of `base`, if it is a Hub id.
        token: Hub token.

    Returns:
        The path of `out`.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: `base` is a directory without a safetensors checkpoint.
        InvalidCheckpointError: a shard is truncated, or a layer's packed tensors are damaged.
        OSError: there is no room for the merged checkpoint.
        ValueError: the adapter is not PEQA's, holds NaN, or was trained on another base.
    """
    return plan_merge(base, adapter, out, revision=revision, token=token).write()


def plan_merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Merge:
    """Check all that [`merge_checkpoint`] needs, and write nothing.

    Args and errors: as [`merge_checkpoint`].
    """
    refuse_existing(out)
    config = PEQAConfig.from_pretrained(os.fspath(adapter), token=token)
    if not isinstance(config, PEQAConfig):
        raise ValueError(
            f"{adapter} is a {config.peft_type.value} adapter. Only PEQA adapters merge into a GPTQ checkpoint: they "
            "change scales alone."
        )
    weights = load_peft_weights(os.fspath(adapter), device="cpu", token=token)
    deltas, others = _by_base_name(weights)
    for name, delta in deltas.items():
        check_finite(f"{adapter}: {name}", delta)

    directory = base
    if not os.path.isdir(base):
        directory = snapshot_download(
            os.fspath(base), revision=revision, token=token, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]
        )
    checkpoint = Checkpoint.open(directory)
    _check_base(checkpoint, config, deltas, others)
    plan = Merge(checkpoint, config, deltas, others, Path(out), (config.base_model_name_or_path, os.fspath(directory)))
    _check_room(plan)
    return plan


def _check_room(plan: Merge) -> None:
    place = next(parent for parent in plan.out.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(place).free, sum(plan.files.values())
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The merged checkpoint takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Make room, or "
            "choose another directory",
            os.fspath(plan.out),
        )


def _by_base_name(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split an adapter's tensors into scale deltas and others (`modules_to_save`), by their name in the base."""
    deltas, others = {}, {}
    for key, tensor in weights.items():
        name = key.removeprefix(_KEY_PREFIX)
        if name.endswith(_DELTA_SUFFIX):
            deltas[name.removesuffix(_DELTA_SUFFIX) + ".scales"] = tensor
        else:
            others[name] = tensor
    return deltas, others


def _check_base(
    checkpoint: Checkpoint, config: PEQAConfig, deltas: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
) -> None:
    declared = declared_format(checkpoint.config.get("quantization_config"))
    if declared is None:
        raise ValueError(f"{checkpoint.directory} is not a GPTQ checkpoint: its config.json has no GPTQ quantization.")
    for name, tensor in {**deltas, **others}.items():
        if name not in checkpoint.shards:
            raise ValueError(f"The adapter has a tensor for {name}, which {checkpoint.directory} does not have.")
        shape = checkpoint.tensor(name).shape
        if shape != tensor.shape:
            raise ValueError(
                f"The adapter's tensor for {name} has shape {tuple(tensor.shape)}, {checkpoint.directory} has "
                f"{tuple(shape)}: it was trained on another base model, {config.base_model_name_or_path}."
            )
    layers = tqdm([name.removesuffix(".scales") for name in deltas], desc="checking the base", unit="layer")
    found = fingerprint(_layer_digest(checkpoint, layer, declared) for layer in layers)
    expected: dict[str, Any] | None = config.base_quantization
    if expected is not None and expected.get("fingerprint") != found:
        raise ValueError(
            f"This adapter was trained on another base model: it expects {expected}, {checkpoint.directory} has "
            f"fingerprint {found}. Pass the base it was trained on ({config.base_model_name_or_path}), unchanged."
        )


def _layer_digest(checkpoint: Checkpoint, layer: str, declared: str) -> bytes:
    tensors = PackedTensors(*(checkpoint.tensor(f"{layer}.{name}") for name in PackedTensors._fields))
    return layer_digest(tensors, check_packed_tensors(layer, tensors), stored_zero_offset(declared))
