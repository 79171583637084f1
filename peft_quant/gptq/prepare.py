"""Memory-saving training of GPTQ layers under any PEFT method."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .dtypes import Apply, activation_dtype, after_cast, warn_of_cast_scales, weight_without_values, without_cast
from .layer import is_packed, linear, packed_tensors, read_format
from .loading import require_readable
from .zero_points import keep_checkpoint_format


def prepare_gptq_for_training(model: nn.Module) -> nn.Module:
    """Make a model's GPTQ layers decode their weights again in backward instead of keeping them dense.

    The training kernels of GPTQ packages save every decoded weight for backward: 2 bytes per weight in 16 bits, four
    times as much as 4-bit packed ones. This replaces the layers' forward with [`peft_quant.gptq.linear`] (EMEF,
    2306.08162), so that PEFT methods that support GPTQ layers (LoRA, OFT, MiSS, VeRA...) train in the memory of the
    packed model. PEQA and LREC need no preparation.

    Works in place, before or after `get_peft_model`, and may be repeated. Tensors, state dicts and saved checkpoints
    stay as they are, except for zero points that `save_pretrained` would have shifted: they are written as the model's
    config declares them. Casting the model leaves the layers' scales in their dtype, and their `weight` has the shape,
    device and dtype of the weight, but no values. [`restore_gptq_forward`] undoes it.

    Args:
        model: a model with GPTQ layers.

    Returns:
        The model.

    Raises:
        ValueError: the model has no GPTQ layers.
        InvalidCheckpointError: layers are packed in the checkpoint and not in the model, or
            [`peft_quant.gptq.read_format`] raises it. No layer is changed then.
        RepackedLayerError: [`peft_quant.gptq.read_format`] raises it.
    """
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is not None:
        require_readable(whole)
    layers = {name: module for name, module in model.named_modules() if is_packed(module)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no GPTQ layers to prepare. Load a GPTQ checkpoint with "
            '`quantization_config=GPTQConfig(bits=..., backend="gptq_torch")`.'
        )
    formats = {name: read_format(layer, name) for name, layer in layers.items() if not is_prepared(layer)}
    warn_of_cast_scales(formats)
    dtype = activation_dtype(model.parameters())
    for name, packed in formats.items():
        layer: Any = layers[name]
        layer._lean_format, layer._lean_dtype = packed, dtype
        layer.__class__ = _lean_class(layer.__class__)
    if whole is not None:
        keep_checkpoint_format(whole)
    return model


def restore_gptq_forward(model: nn.Module) -> nn.Module:
    """Undo [`prepare_gptq_for_training`]: the layers use their own forward again.

    Args:
        model: the model, with or without prepared layers.

    Returns:
        The model.
    """
    for module in model.modules():
        if is_prepared(module):
            del module._lean_format, module._lean_dtype
            module.__class__ = type(module).__bases__[0]
    return model


def is_prepared(module: nn.Module) -> bool:
    """Whether a module is a GPTQ layer that [`prepare_gptq_for_training`] changed."""
    return "_lean_format" in vars(module)


@cache
def _lean_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """A kernel's class with our forward. torch.compile would compile a method set on each layer separately."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return linear(self, self._lean_format, x)

    def weight(self: Any) -> torch.Tensor:
        return weight_without_values(self, self._lean_format, self._lean_dtype)

    def _apply(self: Any, apply: Apply, recurse: bool = True) -> Any:
        self._lean_dtype = after_cast(apply, self._lean_dtype)
        return layer_class._apply(self, without_cast(apply, [packed_tensors(self).scales]), recurse)

    members = {"forward": forward, "weight": property(weight), "_apply": _apply}
    return type(layer_class.__name__, (layer_class,), {**members, "__module__": layer_class.__module__})
