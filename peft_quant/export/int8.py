"""Exports of QFT models as checkpoints that load without peft_quant: bf16 or 8-bit GPTQ."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..files import new_directory
from ..module_names import split_block
from ..ops.packed.packing import pack_rows, pack_zeros
from ..qft.names import conversions_apart_from
from ..qft.weight import Int8Weight
from .card import QFT, best_effort, update_card


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BITS, _ZERO_POINT, _V1 = 8, 128, 1
_SMALLEST_SCALE = 2.0**-14  # the smallest normal fp16 number
# where optimum looks for blocks by default, so that they are found under another head too
_FOUND_BY_ITSELF = (
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
    "model.layers",
    "transformer.h",
)


@dataclass(frozen=True)
class LogitError:
    """Difference between an export's logits and those of the int8 model, both computed in the model's dtype.

    Attributes:
        largest: largest absolute difference.
        mean: mean absolute difference.
        largest_logit: largest absolute logit of the int8 model, for comparison.
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
    | `gptq` | the blocks' linear layers as 8-bit symmetric GPTQ with fp16 scales; all other weights decoded |

    Only blocks of text decoders and encoders are packed, not those of images. GPTQ has no outliers: a layer with
    outliers is encoded again without them, with one scale per row. A layer without outliers keeps its trained integers
    and scales. The export needs as much CPU memory as the size of the checkpoint.

    Args:
        model: the model, which is not changed.
        directory: directory to write, which must not exist; it appears once it is complete.
        format: see above.
        inputs: inputs of one forward pass, to measure the logit error. This holds the decoded model in memory beside
            the model.
        tokenizer: tokenizer to save with the model.

    Returns:
        The logit error on `inputs`, if they are given.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: an unknown format; no int8 weight; a model or layers that transformers cannot load from a GPTQ
            checkpoint (T5, ModernBERT, Conv1D); a layer whose features GPTQ cannot pack; outputs without logits.
    """
    if format not in ("bf16", "gptq"):
        raise ValueError(f"format={format!r}: use 'bf16' or 'gptq'.")
    weights = {name: weight for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)}
    if not weights:
        raise ValueError(f"{type(model).__name__} has no weights in int8, so `save_pretrained` writes it as it is.")
    packed = _pack(model, weights) if format == "gptq" else _Packed({}, {}, {})
    error = None
    if inputs is not None:
        error = _logit_error(model, inputs, packed, torch.bfloat16 if format == "bf16" else None)
    dtype = torch.bfloat16 if format == "bf16" else model.dtype
    skeleton = _skeleton(model, dtype, packed)
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
        facts = {"method": QFT, "export": {"format": format, "logit_error": measured}}
        with best_effort(directory):
            update_card(unfinished, bases=[model.config._name_or_path], facts=facts)
    return error


@dataclass(frozen=True)
class _Packed:
    """Layers in GPTQ's format.

    Attributes:
        tensors: packed tensors by name in the checkpoint.
        weights: the weights they represent, by parameter name.
        config: the quantization config.
    """

    tensors: dict[str, torch.Tensor]
    weights: dict[str, Int8Weight]
    config: dict[str, Any]


def _pack(model: PreTrainedModel, weights: Mapping[str, Int8Weight]) -> _Packed:
    names = _text_layers(model, weights)
    group_size = _common_group_size([weights[name] for name in names])
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, Int8Weight] = {}
    for name in names:
        layer = name.removesuffix(".weight")
        codes, scales = _without_outliers(weights[name], group_size)
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
    return _Packed(tensors, decoded, _config(model, [name.removesuffix(".weight") for name in names], group_size))


def _text_layers(model: Any, weights: Mapping[str, Int8Weight]) -> list[str]:
    """Names of the int8 weights in blocks of text that transformers can load as GPTQ layers.

    Raises:
        ValueError: there are none, or transformers cannot load the model as GPTQ.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"transformers loads GPTQ checkpoints of models of text, and a {type(model).__name__} reads "
            f"{model.main_input_name}: export it as bf16."
        )
    parts = [model.get_decoder(), *([model.get_encoder()] if _is_encoder_decoder(model) else [])]
    of_text = {module for part in parts for module in part.modules()}
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights if split_block(name)[0]}
    found = [name for name, module in modules.items() if type(module) is nn.Linear and module in of_text]
    if not found:
        others = sorted({type(module).__name__ for module in modules.values() if type(module) is not nn.Linear})
        but = f", but not with {', '.join(others)}" if others else ""
        raise ValueError(
            f"{type(model).__name__} has no int8 layers that transformers could load as GPTQ, which it does with "
            f"nn.Linear in a list of blocks{but}: export it as bf16."
        )
    _require_loadable(model, [name.removesuffix(".weight") for name in found])
    return found


def _require_loadable(model: PreTrainedModel, layers: list[str]) -> None:
    """Raise a `ValueError` if transformers initializes weights that GPTQ layers do not have while loading."""
    skeleton = _without_values(model)
    for layer in layers:
        packed = nn.Module()
        packed.bias = skeleton.get_submodule(layer).bias
        skeleton.set_submodule(layer, packed)
    for module in skeleton.modules():
        module._is_hf_initialized = False
    try:
        skeleton.initialize_weights()
    except AttributeError as error:
        raise ValueError(
            f"transformers cannot load a GPTQ checkpoint of a {type(model).__name__}, whose `_init_weights` looks for "
            f"weights that GPTQ layers do not have ({error}): export it as bf16."
        ) from error


def _is_encoder_decoder(model: Any) -> bool:
    return getattr(model.config, "is_encoder_decoder", False)


def _common_group_size(weights: list[Int8Weight]) -> int:
    """In-features per scale if all layers share it and need no new encoding; otherwise -1, one scale per row."""
    sizes = {-1 if weight.scales.shape[1] == 1 else weight.shape[1] // weight.scales.shape[1] for weight in weights}
    return sizes.pop() if len(sizes) == 1 and not any("outlier_values" in weight.parts for weight in weights) else -1


def _without_outliers(weight: Int8Weight, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes `[N, K]` and fp16 scales `[N, G]`: the weight's own, unless it must be encoded again."""
    codes, scales = weight.codes, weight.scales
    if "outlier_values" in weight.parts or (group_size == -1 and scales.shape[1] > 1):
        codes, scales, *_ = ops.encode_weight(weight.dequantize(torch.float32), 0)
    rounded = (scales.abs().clamp(min=_SMALLEST_SCALE) * scales.sign()).half()
    # scales below the smallest are raised to it and their codes shrink; all other codes are kept
    shrink = torch.where(scales.abs() < _SMALLEST_SCALE, scales / rounded.float(), 1)
    in_groups = codes.view(*scales.shape, -1) * shrink[:, :, None]
    return in_groups.round().view(codes.shape).to(torch.int8), rounded


def _config(model: nn.Module, layers: list[str], group_size: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": _BITS,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    places = [(block.blocks, layer) for block, layer in map(split_block, layers) if block]
    # optimum quantizes all layers under `block_name_to_quantize` whose names end with a listed one
    begin = _common_parent({blocks for blocks, _ in places})
    if begin not in _FOUND_BY_ITSELF:
        config["block_name_to_quantize"] = begin
    linear = {name for name, layer in model.named_modules() if _is_linear(layer) and name.startswith(begin)}
    if linear != set(layers) or not begin:  # routers, for instance, are not packed
        ends = sorted({layer for _, layer in places})
        chosen = {name for name in linear if name.endswith(tuple(ends))}
        config["modules_in_block_to_quantize"] = [ends if chosen == set(layers) else layers]
    return config


def _common_parent(names: Iterable[str]) -> str:
    steps = zip(*(name.split(".") for name in names))
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def _is_linear(layer: nn.Module) -> bool:
    """Whether loaders of GPTQ checkpoints treat it as a linear layer."""
    return type(layer) is nn.Linear or isinstance(layer, (nn.Conv2d, Conv1D))


def _tensors(model: nn.Module, packed: _Packed, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state dict to write, on the CPU, with parameters in `dtype` if given. Tied weights share one tensor."""
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


def _skeleton(model: Any, dtype: torch.dtype, packed: _Packed) -> PreTrainedModel:
    """A model on the meta device with the config and name conversions for saving the exported tensors."""
    skeleton = _without_values(model).to(dtype)
    if model.can_generate():
        skeleton.generation_config = model.generation_config
    skeleton._weight_conversions = conversions_apart_from(packed.tensors, model.hf_quantizer.conversions)
    if packed.config:
        skeleton.config.quantization_config = packed.config
    return skeleton


def _without_values(model: Any) -> Any:
    """A float model of the same class and config, on the meta device."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _logit_error(model: Any, inputs: Mapping[str, Any], packed: _Packed, rounding: torch.dtype | None) -> LogitError:
    exported: dict[str, torch.Tensor] = dict(packed.weights)
    for name, parameter in model.named_parameters():
        if name not in exported and rounding is not None:
            dense = parameter.dequantize() if isinstance(parameter, Int8Weight) else parameter
            exported[name] = dense.to(rounding).to(parameter.dtype)
    # an encoder-decoder derives the inputs of its decoder from the labels
    unused = {"num_items_in_batch", *(() if _is_encoder_decoder(model) else ("labels",))}
    inputs = {name: value for name, value in inputs.items() if name not in unused}
    training = model.training
    model.eval()
    try:
        expected = _logits(model(**inputs))
        found = _logits(functional_call(model, exported, (), inputs, tie_weights=True))
    finally:
        model.train(training)
    difference = (found - expected).abs()
    return LogitError(difference.max().item(), difference.mean().item(), expected.abs().max().item())


def _logits(outputs: Any) -> torch.Tensor:
    """All logits among a model's outputs, such as start and end logits, flattened and concatenated."""
    logits = [value.float().flatten() for name, value in outputs.items() if name.endswith("logits")]
    if not logits:
        raise ValueError(
            f"`inputs` ask for the error of logits, and the model's outputs ({', '.join(outputs)}) have none: export "
            "it without them."
        )
    return torch.cat(logits)
