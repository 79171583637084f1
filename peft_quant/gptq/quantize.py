"""Quantization of a float checkpoint with GPTQ, by transformers and optimum."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ..files import new_directory
from .names import with_experts_apart
from .quantize_resume import resumable
from .source import packed_modules
from .zero_points import keep_checkpoint_format


_PACKED_TOGETHER = 32
"""In- and out-features must be multiples of this for gptqmodel to pack them, at every bit width."""


def quantize_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: list[str],
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    exclude: Sequence[str] = (),
    state: str | os.PathLike[str] | None = None,
) -> Path:
    """Quantize a float causal language model to a GPTQ checkpoint (Frantar et al., 2022, arXiv 2210.17323).

    Uses transformers' `GPTQConfig`. Symmetric checkpoints are written in the `gptq` (v1) format, which every engine
    reads; asymmetric ones in `gptq_v2`, which stores every zero point exactly. Everything else (embeddings, norms,
    routers, output head) keeps the dtype of the float checkpoint.

    In a mixture of experts, defuser first splits the experts into modules, which are quantized one by one. The inputs
    of all layers of a block come from the float block, and experts that no calibration token reaches are rounded to
    nearest. In the files they have the names of float checkpoints. transformers loads such a checkpoint after
    `import peft_quant`; gptqmodel and vLLM load it as it is.

    With `state`, each finished layer is saved there. After an interruption, the same call resumes behind the last
    finished layer; on the same device with the same number of threads, the checkpoint is the same bit for bit. Until
    `out` is complete, `state` takes about one byte of disk per quantized weight.

    Args:
        model: directory or Hub id of the float model, with its tokenizer.
        out: directory to write, which must not exist; it appears once it is complete.
        calibration: texts, each one a calibration sample.
        bits: 2, 3, 4 or 8.
        group_size: in-features that share a scale, or -1 for one scale per output channel.
        symmetric: fix every zero point at `2 ** (bits - 1)`.
        act_order: quantize columns in the order of decreasing activation (`desc_act`).
        exclude: names, or ends of names, of layers to leave in float.
        state: directory for finished layers: a new one, or that of an interrupted call. Removed at the end.

    Returns:
        The path of `out`.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no calibration text, options GPTQ does not support, a model that is quantized already or whose
            GPTQ checkpoint transformers could not load, a layer that cannot be packed, or a `state` of another model,
            calibration, version or set of options. All are raised before calibration.
    """
    if not calibration:
        raise ValueError("GPTQ needs calibration texts, got none.")
    float_config = AutoConfig.from_pretrained(model)
    _require_quantizable(os.fspath(model), float_config)
    with new_directory(out) as directory:
        quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        has_experts = _split_experts(quantized)
        config = GPTQConfig(
            bits=bits,
            group_size=group_size,
            sym=symmetric,
            desc_act=act_order,
            act_group_aware=group_size > 0 and not act_order,
            true_sequential=not has_experts,
            dataset=calibration,
            tokenizer=os.fspath(model),
            backend="gptq_torch",
        )
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment()
        quantizer.preprocess_model(quantized)
        options: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "act_order": act_order,
        }
        if exclude:
            options["exclude"] = sorted(exclude)
        with _excluded(quantized, exclude):
            _require_packable(quantized, quantizer.optimum_quantizer)
            with resumable(quantized, state, calibration, options) if state is not None else nullcontext():
                quantizer.postprocess_model(quantized)
        quantized.hf_quantizer = quantizer
        written: Any = quantized.config.quantization_config
        written.dataset = None  # or its texts would be written to config.json
        written.tokenizer = None
        written.backend = "auto"
        written.format = "gptq" if symmetric else "gptq_v2"
        if exclude:
            written.dynamic = {rf"-:.*\.?{re.escape(name)}$": {} for name in exclude}  # for gptqmodel and vLLM
            written.modules_in_block_to_quantize = [_packed_in_blocks(quantized)]  # for transformers
        keep_checkpoint_format(quantized)
        for parameter in quantized.parameters():
            parameter.data = parameter.data.to(float_config.dtype)
        quantized.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    if state is not None and Path(state).exists():
        shutil.rmtree(state)
    return Path(out)


def _require_quantizable(model: str, config: Any) -> None:
    """Check what the config alone tells."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantized already: pass the float model it was made from.")
    classes: Any = AutoModelForCausalLM._model_mapping
    expected = classes[type(config)].__name__ if type(config) in classes else None
    found = (config.architectures or [expected])[0]
    if found != expected or config.get_text_config() is not config:
        raise ValueError(
            f"{model} is a {found}. Only causal language models are quantized here, as transformers loads "
            "their GPTQ checkpoints. Quantize it with GPTQModel, if that supports the architecture: its checkpoints "
            "train here too."
        )


def _split_experts(model: PreTrainedModel) -> bool:
    """Split tensors that hold all experts of a layer into modules, in place. Returns whether there were any."""
    if not _fused_experts(model):
        return False
    from defuser import convert_model

    convert_model(model)
    left = _fused_experts(model)
    if left:
        raise ValueError(
            f"{type(model).__name__} holds all experts of {left[0]} in one tensor, which defuser does not split: "
            "they would stay in float. Update defuser and gptqmodel, or quantize with GPTQModel."
        )
    loaded: Any = model
    loaded._weight_conversions = with_experts_apart(loaded._weight_conversions or ())  # reverted on saving
    return True


def _fused_experts(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd) and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]


def _require_packable(model: PreTrainedModel, optimum: Any) -> None:
    """Check, before calibration, that each layer can be packed.

    Raises:
        ValueError: naming the layers that cannot.
    """
    from optimum.gptq.utils import get_block_name_with_pattern, get_layers

    try:
        blocks = get_block_name_with_pattern(model)
    except ValueError as error:
        raise ValueError(
            f"optimum does not know the blocks of {type(model).__name__}, neither to quantize nor to load them. "
            "Quantize it with GPTQModel: its checkpoints train here too."
        ) from error
    layers = get_layers(model, prefix=blocks)
    if not layers:
        raise ValueError(f"No layer to quantize in {blocks} of {type(model).__name__}.")
    shapes = {name: _features(layer) for name, layer in layers.items()}
    unfit = {name: shape for name, shape in shapes.items() if any(size % _PACKED_TOGETHER for size in shape)}
    if unfit:
        endings = sorted({name.rpartition(".")[2] for name in unfit})
        name, (rows, columns) = next(iter(unfit.items()))
        raise ValueError(
            f"{len(unfit)} layers cannot be packed, {name} first: it has {rows} in- and {columns} out-features, and "
            f"GPTQModel packs multiples of {_PACKED_TOGETHER}. Leave them in float: exclude={endings}, on the command "
            f"line {' '.join(f'--exclude {ending}' for ending in endings)}."
        )
    optimum.select_quant_linear(device_map=None, pack=True)
    for rows, columns in set(shapes.values()):
        try:
            with torch.device("meta"):
                optimum.quant_linear(
                    optimum.bits, optimum.group_size, optimum.desc_act, optimum.sym, rows, columns, False
                )
        except (ValueError, NotImplementedError) as error:
            name = next(name for name, shape in shapes.items() if shape == (rows, columns))
            raise ValueError(
                f"{name}, of {rows} in- and {columns} out-features, cannot be packed in {optimum.bits} bits and "
                f"groups of {optimum.group_size}: {error}"
            ) from error


def _features(layer: Any) -> tuple[int, int]:
    rows, columns = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    return rows, columns


@contextmanager
def _excluded(model: PreTrainedModel, exclude: Sequence[str]) -> Iterator[None]:
    """Context that hides the layers to leave in float from optimum, which finds layers by their class.

    Raises:
        ValueError: a name matches no layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    hidden: dict[str, Any] = {}
    for ending in exclude:
        found = [name for name in layers if f".{name}".endswith(f".{ending}")]
        if not found:
            raise ValueError(f"exclude has {ending!r}, but no layer name of {type(model).__name__} ends with it.")
        hidden |= {name: type(layers[name]) for name in found}
    for name, layer_class in hidden.items():
        layers[name].__class__ = type("FloatLayer", (nn.Module,), {"forward": layer_class.forward})
    try:
        yield
    finally:
        for name, layer_class in hidden.items():
            layers[name].__class__ = layer_class


def _packed_in_blocks(model: PreTrainedModel) -> list[str]:
    """Names of the packed layers within their blocks."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in packed_modules(model)})
