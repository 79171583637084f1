"""State dicts with zero points in the format the config declares, whatever a kernel keeps in memory.

gptqmodel's trainable kernels convert `gptq` (v1) zero points to v2 when a model is loaded, but its config still says
`gptq`, so that `save_pretrained` writes a checkpoint whose zero points are off by one. The hooks here convert on
the way: `state_dict()` returns, and `load_state_dict()` takes, the format that the config declares. Nothing in memory
changes, so training can continue after a save.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.packed.packing import WORD_BITS, convert_zeros
from .layer import is_packed, packed_tensors, zero_offset


def checkpoint_format(model: nn.Module) -> str | None:
    """`"gptq"` (v1) or `"gptq_v2"`, as the quantization config of a model declares; None without a GPTQ config."""
    return declared_format(getattr(getattr(model, "config", None), "quantization_config", None))


def declared_format(quantization_config: Any) -> str | None:
    """[`checkpoint_format`] from a quantization config (object or dict)."""
    if quantization_config is None:
        return None
    if not isinstance(quantization_config, dict):
        quantization_config = quantization_config.to_dict()
    if quantization_config.get("quant_method") != "gptq":
        return None
    return quantization_config.get("checkpoint_format") or quantization_config.get("format") or "gptq"


def stored_zero_offset(declared: str) -> int:
    """The amount subtracted from the zero points that a checkpoint format stores."""
    return 0 if declared == "gptq_v2" else 1


def keep_checkpoint_format(model: nn.Module) -> None:
    """Make a GPTQ model's state dict follow the checkpoint format of its config. Idempotent; needs a GPTQ config."""
    if checkpoint_format(model) is None:
        return
    if any(hook is _to_checkpoint for hook in model._state_dict_hooks.values()):
        return
    model.register_state_dict_post_hook(_to_checkpoint)
    model.register_load_state_dict_pre_hook(_from_checkpoint)


def _to_checkpoint(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: Any) -> None:
    for key, qzeros, bits, in_memory, declared in _packed_zeros(model, state_dict, prefix):
        if torch.equal(state_dict[key], qzeros):  # not yet converted, by the hook of a model within this one
            state_dict[key] = convert_zeros(state_dict[key], bits, in_memory, declared)


def _from_checkpoint(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    for key, qzeros, bits, in_memory, declared in _packed_zeros(model, state_dict, prefix):
        # a state dict taken before the hooks were set is in the format of memory: zero points never train
        if not torch.equal(state_dict[key].to(qzeros.device), qzeros):
            state_dict[key] = convert_zeros(state_dict[key], bits, declared, in_memory)


def _packed_zeros(
    model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str
) -> Iterator[tuple[str, torch.Tensor, int, int, int]]:
    """For each packed layer in a state dict: key, zero points in memory, bits, zero offsets in memory and declared."""
    declared = checkpoint_format(model)
    if declared is None:
        return
    for name, layer in model.named_modules():
        key = f"{prefix}{name}.qzeros"
        if key in state_dict and is_packed(layer):
            tensors = packed_tensors(layer)
            bits = tensors.qweight.shape[0] * WORD_BITS // tensors.g_idx.numel()
            yield key, tensors.qzeros, bits, zero_offset(layer, name), stored_zero_offset(declared)
