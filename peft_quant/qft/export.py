"""What QFT trained, as checkpoints that need no peft_quant: bf16, or 8-bit GPTQ."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..gptq.checkpoint import new_directory
from ..ops.packing import pack_rows, pack_zeros
from ..report.card import QFT, update_card
from .weight import Int8Weight


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BITS, _ZERO_POINT, _V1 = 8, 128, 1
_SMALLEST_SCALE = 2.0**-14  # of fp16 with all of its precision
_IN_BLOCK = re.compile(r"(?P<blocks>.+?)\.\d+\.(?P<layer>.+)")


@dataclass(frozen=True)
class LogitError:
    """How far an export's logits are from those of the int8 model, in the model's own arithmetic.

    Attributes:
        largest: of the absolute differences.
        mean: of the absolute differences.
        largest_logit: of the int8 model, for comparison.
    """

    largest: float
    mean: float
    largest_logit: float


@torch.no_grad()
def export_qft(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    format: Literal["bf16", "gptq"] = "bf16",
    *,
    inputs: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> LogitError | None:
    """Write a model with int8 weights as a checkpoint that transformers loads without peft_quant.

    | format | what is written |
    |---|---|
    | `bf16` | every parameter, decoded and rounded to bf16 |
    | `gptq` | the blocks' linear layers as 8-bit GPTQ, symmetric, with scales in fp16; all else decoded |

    GPTQ has no outliers: layers that have some are encoded again without them, one scale a row. Without outliers,
    integers and scales are those that were trained. It takes as much memory on the CPU as the checkpoint.

    Args:
        model: the model, which stays as it is.
        directory: to write, which must not exist; it appears once it is complete.
        format: see above.
        inputs: of one forward pass, to measure what the format changes; it takes the decoded model in memory beside
            the model.
        tokenizer: to save with it.

    Returns:
        The logit error on `inputs`, if they are given.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: another format; no int8 weight; a layer whose features GPTQ cannot pack.
    """
    if format not in ("bf16", "gptq"):
        raise ValueError(f"format={format!r}: use 'bf16' or 'gptq'.")
    weights = {name: weight for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weights in int8, so `save_pretrained` writes it as it is.")
    packed = _pack(model, weights) if format == "gptq" else _Packed({}, {}, frozenset(), {})
    error = None
    if inputs is not None:
        error = _logit_error(model, inputs, packed, torch.bfloat16 if format == "bf16" else None)
    dtype = torch.bfloat16 if format == "bf16" else model.dtype
    skeleton = _skeleton(model, dtype, packed.config)
    with new_directory(directory) as unfinished:
        skeleton.save_pretrained(unfinished, state_dict=_tensors(model, packed, dtype if format == "bf16" else None))
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        measured = None
        if error is not None:
            measured = {
                "largest difference": error.largest,
                "mean difference": error.mean,
                "largest logit": error.largest_logit,
            }
        update_card(
            unfinished,
            bases=[model.config._name_or_path],
            facts={"method": QFT, "export": {"format": format, "logit_error": measured}},
        )
    return error


@dataclass(frozen=True)
class _Packed:
    """Layers in GPTQ's format.

    Attributes:
        tensors: of the checkpoint, by name.
        weights: what they stand for, `[N, K]`, by the name of the parameter.
        transposed: parameters that are `[K, N]`.
        config: the quantization config.
    """

    tensors: dict[str, torch.Tensor]
    weights: dict[str, Int8Weight]
    transposed: frozenset[str]
    config: dict[str, Any]


def _pack(model: nn.Module, weights: Mapping[str, Int8Weight]) -> _Packed:
    layers = {name: name.removesuffix(".weight") for name in weights}
    places = {name: match for name, layer in layers.items() if (match := _IN_BLOCK.fullmatch(layer))}
    blocks = [match["blocks"] for match in places.values()]
    chosen = max(set(blocks), key=blocks.count, default="")  # where GPTQ engines look for layers
    names = [name for name, match in places.items() if match["blocks"] == chosen]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no int8 layers in a list of blocks, which is where GPTQ engines look for "
            "them: export it as bf16."
        )
    group_size = _common_group_size([weights[name] for name in names])
    transposed = frozenset(name for name in names if isinstance(model.get_submodule(layers[name]), Conv1D))
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, Int8Weight] = {}
    for name in names:
        layer = layers[name]
        codes, scales = _without_outliers(weights[name], group_size, name in transposed)
        rows, columns = codes.shape
        if rows % 4 or columns % 4:
            raise ValueError(
                f"{layer} has {columns} in- and {rows} out-features, and GPTQ packs 8 bits in fours: export it as "
                "bf16."
            )
        groups = scales.shape[1]
        zeros = torch.full((groups, rows), _ZERO_POINT, device=codes.device)
        packed = {
            "qweight": pack_rows((codes.short() + _ZERO_POINT).t(), _BITS),
            "qzeros": pack_zeros(zeros, _BITS, _V1),
            "scales": scales.t().contiguous(),
            "g_idx": (torch.arange(columns, device=codes.device) // (columns // groups)).int(),
        }
        tensors |= {f"{layer}.{part}": tensor.cpu() for part, tensor in packed.items()}
        decoded[name] = Int8Weight.from_parts(codes, scales.float(), dtype=weights[name].dtype)
    config = _config(model, chosen, [layers[name] for name in names], group_size)
    return _Packed(tensors, decoded, transposed, config)


def _common_group_size(weights: list[Int8Weight]) -> int:
    """In-features to a scale that all layers have, without encoding anything again; -1 if that is one scale a row."""
    sizes = {-1 if weight.scales.shape[1] == 1 else weight.shape[1] // weight.scales.shape[1] for weight in weights}
    return sizes.pop() if len(sizes) == 1 and not any("outlier_values" in weight.parts for weight in weights) else -1


def _without_outliers(weight: Int8Weight, group_size: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes `[N, K]` and fp16 scales `[N, G]`: the weight's own if they serve."""
    codes, scales = weight.codes, weight.scales
    if transposed or "outlier_values" in weight.parts or (group_size == -1 and scales.shape[1] > 1):
        dense = weight.dequantize(torch.float32)
        codes, scales, *_ = ops.encode_weight(dense.t().contiguous() if transposed else dense, 0)
    rounded = (scales.abs().clamp(min=_SMALLEST_SCALE) * scales.sign()).half()
    # a row of tiny weights gets smaller codes under the smallest scale; all others keep theirs
    shrink = torch.where(scales.abs() < _SMALLEST_SCALE, scales / rounded.float(), 1)
    in_groups = codes.view(*scales.shape, -1) * shrink[:, :, None]
    return in_groups.round().view(codes.shape).to(torch.int8), rounded


def _config(model: nn.Module, blocks: str, layers: list[str], group_size: int) -> dict[str, Any]:
    config = {
        "quant_method": "gptq",
        "bits": _BITS,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    in_blocks = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
    in_blocks = [name for name in in_blocks if name.startswith(f"{blocks}.")]
    if set(in_blocks) != set(layers):  # as routers, say
        within = {match["layer"] for layer in layers if (match := _IN_BLOCK.fullmatch(layer))}
        config["modules_in_block_to_quantize"] = [sorted(within)]
    return config


def _tensors(model: nn.Module, packed: _Packed, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state dict to write, on the CPU: tied weights are one tensor, all in `dtype` if one is given."""
    tensors = dict(packed.tensors)
    written: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in packed.weights:
            if id(parameter) not in written:
                dense = parameter.dequantize() if isinstance(parameter, Int8Weight) else parameter.detach()
                written[id(parameter)] = dense.to("cpu", dtype)
            tensors[name] = written[id(parameter)]
    buffers = dict(model.named_buffers())
    tensors |= {name: buffers[name].cpu() for name in model.state_dict() if name in buffers}
    return tensors


def _skeleton(model: PreTrainedModel, dtype: torch.dtype, quantization: dict[str, Any]) -> PreTrainedModel:
    """A model without weights that saves tensors as this one would."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        skeleton: Any = type(model)(config)
    skeleton.to(dtype)
    skeleton.generation_config = model.generation_config
    if hasattr(model, "_weight_conversions"):
        skeleton._weight_conversions = model._weight_conversions
    if quantization:
        skeleton.config.quantization_config = quantization
    return skeleton


def _logit_error(
    model: PreTrainedModel, inputs: Mapping[str, Any], packed: _Packed, rounding: torch.dtype | None
) -> LogitError:
    exported: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in packed.weights:
            weight = packed.weights[name]
            exported[name] = weight.dequantize().t() if name in packed.transposed else weight
        elif rounding is not None:
            dense = parameter.dequantize() if isinstance(parameter, Int8Weight) else parameter
            exported[name] = dense.to(rounding).to(parameter.dtype)
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    training = model.training
    model.eval()
    try:
        expected = model(**inputs).logits.float()
        found = functional_call(model, exported, (), inputs, tie_weights=True).logits.float()
    finally:
        model.train(training)
    difference = (found - expected).abs()
    return LogitError(difference.max().item(), difference.mean().item(), expected.abs().max().item())
