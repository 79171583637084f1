"""Any GPTQ linear layer: the format of its packed tensors, and products with them.

Tensors are read by attribute, never by the name of the layer's class.

Works for the trainable layers of gptqmodel, those of auto-gptq 0.7.1 and any module with `qweight`, `qzeros`, `scales`
and `g_idx`. The layer's own forward is never called: depending on the kernel it keeps dense weights for backward,
compiles itself, repacks its weights or stops gradients. Its `sym` and `desc_act` are not read either: optimum swaps
them in the layers it loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import ops
from ..ops.packed.packing import unpack_zeros
from .check import InvalidCheckpointError, PackedTensors, check_packed_tensors


# QUANT_TYPE of auto-gptq's layers that repack on initialization; gptqmodel's say SUPPORTS_TRAINING = False
_REPACKING_AUTO_GPTQ = ("exllama", "exllamav2", "marlin", "qigen")

_LOAD_WITH_TORCH_KERNEL = (
    'Load the model with `quantization_config=GPTQConfig(bits=..., backend="gptq_torch")`, which keeps the packed '
    "tensors as they are in the checkpoint at every bit width and on every device."
)


class RepackedLayerError(TypeError):
    """A GPTQ layer whose kernel changed its packed tensors, so that they can no longer be read or trained."""


@dataclass(frozen=True)
class PackedFormat:
    """How to read a layer's packed tensors.

    Attributes:
        bits: bits per code: 2, 3, 4 or 8.
        in_features: `K`.
        out_features: `N`.
        group_size: rows that share a scale; `K` if all do (`group_size=-1` in a GPTQ config). The last group may be
            shorter.
        zero_offset: the amount subtracted from the zero points in memory: 1 for `gptq` (v1), 0 for `gptq_v2`.
        act_order: whether `g_idx` assigns rows to groups in another order than `k // group_size` (`desc_act`).
        zero_point: the layer's zero point if all are equal, else None; `2 ** (bits - 1)` in symmetric quantization.
        scale_dtype: the dtype of the scales in the checkpoint.
    """

    bits: int
    in_features: int
    out_features: int
    group_size: int
    zero_offset: int
    act_order: bool
    zero_point: int | None
    scale_dtype: torch.dtype

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def symmetric(self) -> bool:
        return self.zero_point == 1 << (self.bits - 1)


def is_packed(module: nn.Module) -> bool:
    """Whether a module holds GPTQ-packed weights, or held them before its kernel repacked them."""
    return _has_packed_tensors(module) or "gptq" in (getattr(module, "SUPPORTS_METHODS", None) or ())


def _has_packed_tensors(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in PackedTensors._fields)


def packed_tensors(layer: nn.Module) -> PackedTensors:
    """The packed tensors of a layer, as they are in memory."""
    return PackedTensors(*(getattr(layer, name) for name in PackedTensors._fields))


def _quant_type(module: nn.Module) -> str | None:
    quant_type = getattr(module, "QUANT_TYPE", None)
    return quant_type if isinstance(quant_type, str) else None


def read_format(layer: nn.Module, name: str | None = None) -> PackedFormat:
    """Read the format of a GPTQ layer, after checking that its tensors can be trusted.

    Args:
        layer: a module for which [`is_packed`] holds.
        name: the layer's name in errors; its class by default.

    Raises:
        RepackedLayerError: the layer's kernel keeps the weights in its own layout.
        InvalidCheckpointError: the tensors contradict each other or the layer, or hold values out of range.
        ValueError: the layer's tensors are offloaded.
    """
    kind = type(layer).__name__
    name = f"{name} ({kind})" if name else kind
    reason = repacked(layer)
    if reason:
        raise RepackedLayerError(f"{name} cannot be trained: {reason}. {_LOAD_WITH_TORCH_KERNEL}")
    tensors = packed_tensors(layer)
    qweight, g_idx = tensors.qweight, tensors.g_idx
    if qweight.is_meta and hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{name} is offloaded by accelerate and cannot be trained. Load the model with a `device_map` that keeps "
            "every layer on a GPU, or every layer on the CPU."
        )
    packed = tensor_format(name, tensors, zero_offset(layer, name))
    _check_stated_shape(layer, name, packed.bits, packed.in_features, packed.out_features)
    return replace(packed, group_size=_stated_group_size(layer, g_idx)) if qweight.is_meta else packed


def tensor_format(name: str, tensors: PackedTensors, offset: int) -> PackedFormat:
    """The format of packed tensors, after checking that they can be trusted.

    Args:
        name: the layer's name in errors.
        tensors: the layer's tensors. On the meta device, their group order and zero points are unknown.
        offset: the amount subtracted from their zero points: 1 for `gptq` (v1), 0 for `gptq_v2`.

    Raises:
        InvalidCheckpointError: the tensors contradict each other, or hold values out of range.
    """
    bits = check_packed_tensors(name, tensors)
    qweight, qzeros, scales, g_idx = tensors
    on_meta = qweight.is_meta
    group_size, act_order = (g_idx.numel(), False) if on_meta else _grouping(g_idx, scales.shape[0])
    return PackedFormat(
        bits=bits,
        in_features=g_idx.numel(),
        out_features=qweight.shape[1],
        group_size=group_size,
        zero_offset=offset,
        act_order=act_order,
        zero_point=None if on_meta else _only_value(unpack_zeros(qzeros, bits, offset)),
        scale_dtype=scales.dtype,
    )


def repacked(layer: nn.Module) -> str | None:
    """Why the packed tensors of a layer cannot be read, if its kernel has changed them; else None."""
    quant_type = _quant_type(layer)
    if getattr(layer, "SUPPORTS_TRAINING", None) is False or quant_type in _REPACKING_AUTO_GPTQ:
        return f"its kernel ({quant_type}) keeps the weights in its own layout"
    if getattr(layer, "linear_mode", None) == "inference":
        return "its kernel repacked the weights for inference when the model was first evaluated"
    if getattr(layer, "planar", False):
        return "it uses the planar gptq_p layout, not GPTQ's"
    if not _has_packed_tensors(layer):
        return f"its kernel ({quant_type}) removed the packed tensors"
    return None


def _check_stated_shape(layer: nn.Module, name: str, bits: int, in_features: int, out_features: int) -> None:
    for attributes, actual in (
        (("bits",), bits),
        (("in_features", "infeatures"), in_features),
        (("out_features", "outfeatures"), out_features),
    ):
        for attribute in attributes:
            stated = getattr(layer, attribute, None)
            if isinstance(stated, int) and stated != actual:
                raise InvalidCheckpointError(
                    f"{name} says {attribute}={stated}, but its packed tensors hold {actual}. Check `bits` and "
                    "`group_size` of the quantization config against the checkpoint."
                )


def zero_offset(layer: nn.Module, name: str) -> int:
    """1 if the zero points in memory are stored minus one (v1), 0 if as they are (v2).

    For gptqmodel's layers, the format their kernel needs decides, not `qzero_format()`, which still says 1 (v1) for
    layers loaded from a v2 checkpoint.
    """
    requires_v2 = getattr(layer, "REQUIRES_FORMAT_V2", None)
    if requires_v2 is not None:
        return int(not requires_v2)
    checkpoint_format = getattr(layer, "checkpoint_format", None)
    if checkpoint_format in ("gptq", "gptq_v2"):
        return int(checkpoint_format == "gptq")
    if _quant_type(layer) is not None and hasattr(layer, "infeatures"):  # auto-gptq knows v1 only
        return 1
    raise InvalidCheckpointError(
        f"{name} does not say how its zero points are stored. Set `checkpoint_format` on it to 'gptq' (zero points "
        "stored minus one, as auto-gptq writes them) or to 'gptq_v2' (stored as they are)."
    )


def _grouping(g_idx: torch.Tensor, groups: int) -> tuple[int, bool]:
    """The group size, and whether `g_idx` departs from `k // group_size`."""
    rows = g_idx.numel()
    group_size = rows if groups == 1 else int((g_idx == 0).sum())
    in_order = torch.arange(rows, device=g_idx.device) // group_size
    return group_size, not torch.equal(g_idx.long(), in_order)


def _only_value(zeros: torch.Tensor) -> int | None:
    low, high = torch.aminmax(zeros)
    return int(low) if low == high else None


def _stated_group_size(layer: nn.Module, g_idx: torch.Tensor) -> int:
    stated = getattr(layer, "group_size", -1)
    return stated if stated > 0 else g_idx.numel()


def linear(
    layer: nn.Module, packed: PackedFormat, x: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """`y = x @ W + bias` from the layer's packed tensors; nothing dense is kept for backward.

    Args:
        layer: the GPTQ layer.
        packed: its format, from [`read_format`].
        x: `[..., K]`, floating point; cast to autocast's dtype where autocast is on.
        scales: `[G, N]` to use instead of the layer's own; the only tensor besides `x` that receives a gradient.

    Returns:
        `[..., N]` in the dtype of `x` (autocast's dtype where it is on).

    Raises:
        TypeError: `x` is not floating point.
        ValueError: the layer's scales were cast since its format was read.
    """
    x = _activations(x)
    return _add_bias(layer, ops.linear(x, _packed_weight(_tensors_as_read(layer, packed, scales), packed)))


def lora_linear(
    layer: nn.Module,
    packed: PackedFormat,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`y = x @ W + scaling * (x @ A^T) @ B^T + bias` in one step, which casts once and saves only `x` and `x @ A^T`.

    Args:
        layer: the GPTQ layer.
        packed: its format, from [`read_format`].
        x: `[..., K]`, floating point; cast to autocast's dtype where autocast is on.
        lora_a: `[R, K]`, floating point.
        lora_b: `[N, R]`, floating point. Both factors and `x` receive gradients.
        scaling: factor of the low-rank product.

    Returns:
        `[..., N]` in the dtype of `x` (autocast's dtype where it is on).

    Raises:
        TypeError: `x` is not floating point.
        ValueError: the layer's scales were cast since its format was read.
    """
    x = _activations(x)
    weight = _packed_weight(_tensors_as_read(layer, packed), packed)
    return _add_bias(layer, ops.lora_linear(x, lora_a, lora_b, scaling, weight))


def _tensors_as_read(layer: nn.Module, packed: PackedFormat, scales: torch.Tensor | None = None) -> PackedTensors:
    """The layer's tensors, with other scales if given."""
    tensors = packed_tensors(layer)
    if tensors.scales.dtype != packed.scale_dtype:
        raise ValueError(
            f"The scales of a {type(layer).__name__} were cast from {packed.scale_dtype} to {tensors.scales.dtype}, "
            "and are no longer those of the checkpoint. Load the model again, and cast it as a whole, with the "
            "adapter on (`model.to(dtype)`), which leaves scales as they are."
        )
    return tensors if scales is None else tensors._replace(scales=scales)


def _activations(x: torch.Tensor) -> torch.Tensor:
    """Cast activations to the dtype of autocast, where it is on."""
    if not x.is_floating_point():
        raise TypeError(
            f"A GPTQ layer takes activations in floating point, not {x.dtype}. If the model casts them to the dtype "
            "of `qweight`, let it use that of `weight`, which adapted and prepared layers have."
        )
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # meta has no autocast
        return x
    return x.to(torch.get_autocast_dtype(device))


def _add_bias(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    bias = getattr(layer, "bias", None)
    return y if bias is None else y + bias.to(y.dtype)


def dequantize(
    layer: nn.Module, packed: PackedFormat, scales: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Decode the layer's weight: dense `[N, K]`, as in `nn.Linear`.

    Raises:
        ValueError: the layer's scales were cast since its format was read.
    """
    return dequantize_tensors(_tensors_as_read(layer, packed, scales), packed, dtype)


def dequantize_tensors(
    tensors: PackedTensors, packed: PackedFormat, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[`dequantize`] for tensors without a layer."""
    return ops.dequantize(_packed_weight(tensors, packed), dtype).t()


def _packed_weight(tensors: PackedTensors, packed: PackedFormat) -> ops.PackedWeight:
    qweight, qzeros, scales, g_idx = tensors
    g_idx_in_use = g_idx.to(qweight.device) if packed.act_order else None
    return ops.PackedWeight(qweight, qzeros, scales, g_idx_in_use, packed.bits, packed.group_size, packed.zero_offset)
