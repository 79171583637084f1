"""Conversion of a model in memory, in float or GPTQ, to int8."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..gptq import PackedFormat, dequantize, is_packed, packed_tensors, read_format
from ..gptq.dtypes import warn_of_cast_scales
from ..gptq.loading import require_readable
from ..gptq.names import has_experts_apart
from ..gptq.source import packed_modules
from ..ops.packed.packing import unpack_rows
from .config import QFTConfig
from .policy import int8_modules
from .quantizer import attach_quantizer
from .weight import Int8Weight


Model = TypeVar("Model", bound=nn.Module)


def convert_to_int8(model: Model, config: QFTConfig | None = None) -> Model:
    """Convert a model's linear layers to int8, to be trained with [`QFTTrainer`]. Works in place, layer by layer.

    | from | to |
    |---|---|
    | a float layer (nn.Linear, Conv1D) | int8 by round-to-nearest, with the largest weights of each row as outliers |
    | GPTQ, 8 bits, symmetric, whole groups, no act-order | its integers and scales unchanged, no outliers |
    | other GPTQ | decoded, then converted like a float layer |

    Norms, biases, routers, embeddings and the head stay in float; a packed head is decoded.
    `AutoModelForCausalLM.from_pretrained(..., quantization_config=QFTConfig())` does the same to a float checkpoint
    without ever holding the whole float model.

    Args:
        model: a float model, or one loaded from a GPTQ checkpoint with `GPTQConfig(bits=..., backend="gptq_torch")`.
        config: the options; by default 1 % outliers, and embeddings in float.

    Returns:
        The model.

    Raises:
        ValueError: the model has no linear layer, is quantized with another method, is int8 already, or has a weight
            with NaN.
        RepackedLayerError: as in [`peft_quant.gptq.read_format`].
        InvalidCheckpointError: as in [`peft_quant.gptq.read_format`].
    """
    config = copy.copy(config or QFTConfig())
    config.experts_apart = has_experts_apart(model)
    _refuse_quantized(model)
    require_readable(model)
    modules = int8_modules(model, config)
    formats = {name: read_format(layer, name) for name, layer in modules.items() if is_packed(layer)}
    warn_of_cast_scales(formats)
    float_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    conv1d_layers = _conv1d_layers(model) if formats else set()
    first = {id(getattr(layer, "weight", layer)): name for name, layer in reversed(modules.items())}
    ties = {name: first[id(getattr(layer, "weight", layer))] for name, layer in modules.items()}
    for name, module in modules.items():
        layer: Any = module
        try:
            if name in formats:
                transposed = name in conv1d_layers
                weight = _from_gptq(layer, formats[name], config, float_dtype, transposed)
                model.set_submodule(name, _linear(layer, weight, float_dtype, transposed))
            elif ties[name] == name:
                weight = Int8Weight.from_dense(layer.weight, config.outlier_ratio)
                layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            else:
                layer.weight = model.get_parameter(f"{ties[name]}.weight")
        except ValueError as error:
            raise ValueError(f"{name} cannot be held in int8: {error}") from error
    for name, packed_layer in packed_modules(model).items():  # left in float by the policy
        dense = dequantize(packed_layer, read_format(packed_layer, name), dtype=float_dtype)
        if name in conv1d_layers:
            dense = dense.t()
        model.set_submodule(name, _linear(packed_layer, dense.contiguous(), float_dtype, name in conv1d_layers))
    if hasattr(model, "config"):
        attach_quantizer(model, config)
    return model


def _refuse_quantized(model: Any) -> None:
    if any(isinstance(parameter, Int8Weight) for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} holds its weights in int8 already: train it as it is.")
    method = getattr(getattr(model, "quantization_method", None), "value", getattr(model, "quantization_method", None))
    if method not in (None, "gptq"):
        raise ValueError(
            f"{type(model).__name__} is quantized with {method}, whose weights QFT cannot read. Load the float model "
            "or a GPTQ checkpoint."
        )


def _conv1d_layers(model: nn.Module) -> set[str]:
    """Names of layers that are a Conv1D (transposed weight) in the float model, which packed layers do not record."""
    if not isinstance(model, PreTrainedModel):
        return set()
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        float_model = type(model)(config)
    return {name for name, module in float_model.named_modules() if isinstance(module, Conv1D)}


def _from_gptq(
    layer: nn.Module, packed: PackedFormat, config: QFTConfig, dtype: torch.dtype, transposed: bool
) -> Int8Weight:
    whole_groups = packed.in_features % packed.group_size == 0
    if packed.bits == 8 and packed.symmetric and not packed.act_order and whole_groups and not transposed:
        tensors = packed_tensors(layer)
        codes = (unpack_rows(tensors.qweight, 8).t() ^ 0x80).contiguous().view(torch.int8)  # minus 128, the zero point
        return Int8Weight.from_parts(codes, tensors.scales.t().float(), dtype=dtype)
    dense = dequantize(layer, packed)
    return Int8Weight.from_dense(dense.t() if transposed else dense, config.outlier_ratio, dtype)


def _linear(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype, transposed: bool) -> nn.Module:
    rows, columns = weight.shape
    with torch.device("meta"):
        linear = Conv1D(columns, rows) if transposed else nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(weight)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype))
    return linear.train(layer.training)
