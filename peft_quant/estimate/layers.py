"""Quantized layers on the meta device, which replace a model's linear layers for counting."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..ops.packed.packing import SUPPORTED_BITS, WORD_BITS
from ..qft import Int8Weight


_NF4_BLOCK, _NF4_OUTER_BLOCK = 64, 256


def shape(layer: nn.Module) -> tuple[int, int]:
    """In-features and out-features of a linear layer."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


class PackedLinear(nn.Module):
    """A GPTQ layer with groups of consecutive rows, symmetric or asymmetric.

    Raises:
        ValueError: GPTQ cannot pack this number of bits or features, or `group_size` is out of range.
    """

    def __init__(self, layer: nn.Module, name: str, bits: int, group_size: int) -> None:
        super().__init__()
        rows, columns = shape(layer)
        if bits not in SUPPORTED_BITS:
            raise ValueError(f"bits={bits}: GPTQ layers have {', '.join(map(str, SUPPORTED_BITS))} bits a weight.")
        if rows % WORD_BITS or columns % WORD_BITS:
            raise ValueError(
                f"{name} has {rows} in-features and {columns} out-features: GPTQ packs multiples of {WORD_BITS}."
            )
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size={group_size}: use a number of rows, or -1 for one group a layer.")
        self.in_features, self.out_features, self.bits = rows, columns, bits
        self.group_size = rows if group_size == -1 else min(group_size, rows)
        self.checkpoint_format = "gptq"
        groups = -(-rows // self.group_size)
        self.register_buffer("qweight", torch.empty(rows * bits // WORD_BITS, columns, dtype=torch.int32))
        self.register_buffer("qzeros", torch.empty(groups, columns * bits // WORD_BITS, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(groups, columns, dtype=torch.float16))
        self.register_buffer("g_idx", torch.empty(rows, dtype=torch.int32))
        self.register_buffer("bias", None if layer.bias is None else torch.empty(columns, dtype=torch.float16))


class NF4Linear(nn.Module):
    """The NF4 layer of QLoRA (Dettmers et al., 2023, arXiv 2305.14314) in bitsandbytes.

    Weights are 4-bit NormalFloat with an 8-bit scale per 64 weights and an fp32 scale per 256 of those scales (double
    quantization).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        rows, columns = shape(layer)
        self.in_features, self.out_features = rows, columns
        blocks = -(-rows * columns // _NF4_BLOCK)
        self.register_buffer("qweight", torch.empty(rows * 4 // WORD_BITS, columns, dtype=torch.int32))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("nested_absmax", torch.empty(-(-blocks // _NF4_OUTER_BLOCK)))
        self.register_buffer("nested_quant_map", torch.empty(256))
        self.register_buffer("nested_offset", torch.empty(()))
        self.register_buffer("quant_map", torch.empty(16))
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # decoded in forward and again in backward, like GPTQ layers; the meaning of the codes does not matter here
        qweight, scale = self.get_buffer("qweight"), self.get_buffer("nested_offset")
        zeros, scales = qweight[:1, : self.out_features * 4 // WORD_BITS], scale.expand(1, self.out_features)
        weight = ops.PackedWeight(qweight, zeros, scales, None, 4, self.in_features, 0)
        y: Any = ops.linear(x.to(torch.bfloat16), weight).to(x.dtype)
        return (y if self.bias is None else y + self.bias).clone()  # PEFT's layer clones its result


class QLoraLinear(LoraLinear):
    """PEFT's LoRA layer for bitsandbytes, which leaves casting the input to autocast."""

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        return x


def int8_weight(layer: nn.Module, outlier_ratio: float) -> nn.Parameter:
    """The layer's weight as QFT stores it: int8 codes, row scales and outliers."""
    weight = layer.get_parameter("weight")
    rows, columns = weight.shape
    codes, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
    outliers = round(outlier_ratio * columns)
    places = values = None
    if outliers:
        places = torch.empty(rows, outliers, dtype=torch.int16 if columns <= 1 << 15 else torch.int32)
        values = torch.empty(rows, outliers)
    return nn.Parameter(Int8Weight(codes, scales, places, values, weight.dtype))
