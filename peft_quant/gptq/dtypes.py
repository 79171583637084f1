"""Dtypes of GPTQ layers: of the scales, which casting the model must not round, and of the activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .layer import PackedFormat, packed_tensors


Apply = Callable[[torch.Tensor], torch.Tensor]
"""What `Module._apply` does to each tensor: a move, a cast or both."""


class PackedWeight(torch.Tensor):
    """The `weight` of a GPTQ layer, for code that asks for its shape, dtype or device.

    It has no values: every operation on it raises.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> PackedWeight:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} needs the values of a weight that is packed: `layer.weight` of a GPTQ layer has a shape, "
            "a dtype and a device only. Decode it with `peft_quant.gptq.dequantize`, or, of an adapted layer, with "
            "`layer.get_base_weight()`."
        )


def weight_without_values(layer: nn.Module, packed: PackedFormat, dtype: torch.dtype) -> torch.Tensor:
    """The `weight` of a GPTQ layer: its shape and device, and the given dtype, without values."""
    shape, qweight = (packed.out_features, packed.in_features), packed_tensors(layer).qweight
    if torch.compiler.is_compiling():  # Dynamo makes no tensors of such classes
        return qweight.new_full((), torch.nan, dtype=dtype).expand(shape)
    return PackedWeight(shape, dtype, qweight.device)


def activation_dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """The dtype that a model with these parameters computes in: that of the first floating point one."""
    dtypes = (parameter.dtype for parameter in parameters if parameter.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def after_cast(apply: Apply, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor of the given one has after `apply`."""
    return apply(torch.empty(0, dtype=dtype)).dtype


def without_cast(apply: Apply, tensors: Iterable[torch.Tensor]) -> Apply:
    """The same function, except that the given tensors are moved and not cast."""
    kept = {id(tensor): tensor for tensor in tensors}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        result = apply(tensor)
        return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

    return move


def warn_of_cast_scales(formats: Mapping[str, PackedFormat]) -> None:
    """Warn of scales that are not fp16, as they are in GPTQ checkpoints: the model was most likely cast.

    Args:
        formats: the layers' formats, by name.
    """
    others = {name: packed.scale_dtype for name, packed in formats.items() if packed.scale_dtype != torch.float16}
    if others:
        name, dtype = next(iter(others.items()))
        warnings.warn(
            f"The scales of {name} and {len(others) - 1} more layers are {dtype} in memory, where GPTQ checkpoints "
            "have torch.float16. If the model was cast after it was loaded, these are not the scales of its "
            "checkpoint, and what is trained on them does not fit it. Load the model again in the dtype to compute in "
            "(`from_pretrained(..., dtype=...)` leaves scales as they are), or cast it after adding the adapter.",
            stacklevel=3,
        )
