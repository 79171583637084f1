"""GPTQ checkpoints in `from_pretrained`: every layer that is packed in the files is packed in the model.

transformers and optimum pack the layers that the config implies, all with the same bits. Other packed layers (the
experts of a mixture, which transformers keeps in one tensor, the output head, layers of other bits) get random weights
with a log line and no error. Here the files decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPTQConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

from ..ops.packed.packing import SUPPORTED_BITS, WORD_BITS, convert_zeros
from ..reading import read_json
from .check import InvalidCheckpointError
from .checkpoint import StoredTensor, group_size, packed_layers, quantization_config, read_tensors
from .layer import repacked, tensor_format, zero_offset
from .names import has_experts_apart, loaded_names, missing_layers, with_experts_apart
from .source import Source, packed_modules
from .zero_points import checkpoint_format, stored_zero_offset


logger = logging.getLogger(__name__)


class GPTQCheckpointQuantizer(GptqHfQuantizer):
    """transformers' quantizer for GPTQ models, which packs the layers that are packed in the checkpoint's files.

    Experts of a mixture become separate modules (through the package defuser, which gptqmodel installs), each layer
    has the bits and group size of its tensors, and a missing `g_idx` means no act-order. The config may also be
    auto-gptq's `quantize_config.json` or, where the files have none, what the caller passes.

    Attributes:
        checkpoint_files: the safetensors files that the model was loaded from; empty if it was not loaded.

    Raises (from `from_pretrained`):
        InvalidCheckpointError: a packed layer has no counterpart in the model, or tensors that contradict it.
    """

    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.checkpoint_files: tuple[Path, ...] = ()
        self._without_order: dict[str, int] = {}
        self._experts_apart = False
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        self.checkpoint_files = tuple(
            Path(file) for file in checkpoint_files or () if Path(file).suffix == ".safetensors"
        )
        tensors = read_tensors(self.checkpoint_files)
        stored_layers = packed_layers(tensors)
        if not stored_layers:
            super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
            return
        self._take_stored_config(self.checkpoint_files[0].parent)
        names = self._layers_of(model, stored_layers)
        self._experts_apart = has_experts_apart(model)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        kernel = self._kernels(device_map)
        for stored, name in names.items():
            packed = _make_layer(model.get_submodule(name), name, stored, tensors, self.optimum_quantizer, kernel)
            model.set_submodule(name, packed)
            if f"{stored}.g_idx" not in tensors:
                self._without_order[name] = packed.group_size
        self._allow_missing_order(model)

    def _take_stored_config(self, directory: Path) -> None:
        """Take from the checkpoint what transformers dropped or did not find."""
        file = directory / "config.json"
        stored = quantization_config(directory, read_json(file) if file.is_file() else {}) or {}
        if not self.pre_quantized:
            from optimum.gptq import GPTQQuantizer

            backend = self.quantization_config.backend
            if stored:
                self.quantization_config = GPTQConfig.from_dict({**stored, "backend": backend})
            self.optimum_quantizer = GPTQQuantizer.from_dict(self.quantization_config.to_dict_optimum())
            self.pre_quantized = True
        for name, value in stored.items():
            if not hasattr(self.quantization_config, name) and name not in ("checkpoint_format", "quant_method"):
                setattr(self.quantization_config, name, value)

    def _layers_of(self, model: PreTrainedModel, stored_layers: list[str]) -> dict[str, str]:
        """The names of the layers to pack, by their names in the files."""
        names = loaded_names(stored_layers, model)
        if missing_layers(model, names.values(), _linear_layers(model)):
            from defuser import convert_model

            convert_model(model)
            names = loaded_names(stored_layers, model)
            missing = missing_layers(model, names.values(), _linear_layers(model))
            if missing:
                raise InvalidCheckpointError(
                    f"The checkpoint has {len(names)} packed layers, and for {len(missing)} of them, {missing[0]} "
                    f"first, {type(model).__name__} has no linear layer. Update transformers, gptqmodel and defuser, "
                    "or load the class that `architectures` in config.json names."
                )
        linear = _linear_layers(model)
        return {stored: name for stored, name in names.items() if name in linear}

    def _kernels(self, device_map: Any) -> Callable[[int, int], type[nn.Module]]:
        @cache
        def kernel(bits: int, group_size: int) -> type[nn.Module]:
            optimum = copy(self.optimum_quantizer)
            optimum.bits, optimum.group_size = bits, group_size
            optimum.select_quant_linear(device_map=device_map, pack=False)
            return optimum.quant_linear

        self.optimum_quantizer.select_quant_linear(device_map=device_map, pack=False)
        return kernel

    def _allow_missing_order(self, model: PreTrainedModel) -> None:
        if not self._without_order:
            return
        if self.optimum_quantizer.desc_act:
            name = next(iter(self._without_order))
            raise InvalidCheckpointError(
                f"{name} has no g_idx, and the quantization config says desc_act=true, under which only g_idx tells "
                "the groups of the rows. Download the checkpoint again; if it was quantized without act-order, set "
                "desc_act to false."
            )
        patterns: Any = model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_missing = [*(patterns or []), r"\.g_idx$"]  # of this model only

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:  # from 5.23 on
        if self._experts_apart:
            weight_conversions = with_experts_apart(weight_conversions)
        return super().update_weight_conversions(weight_conversions, *model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, size in self._without_order.items():
            g_idx: Any = model.get_submodule(name).g_idx
            g_idx.copy_(torch.arange(g_idx.numel(), device=g_idx.device) // size)
        for name, parameter in model.named_parameters():  # transformers before 5.23 leaves renamed ones as in the file
            if parameter.dtype in (torch.float16, torch.bfloat16) and name in self._dtypes:
                parameter.data = parameter.data.to(self._dtypes[name])
        super()._process_model_after_weight_loading(model, **kwargs)


def require_readable(model: nn.Module) -> None:
    """Check that the layers packed in a model are those packed in its files, and reload layers that were repacked.

    Inference kernels keep weights in their own layouts, some from their first evaluation on. If the files that the
    model was loaded from still exist, such layers are replaced in place by layers with gptqmodel's torch kernel.

    Raises:
        InvalidCheckpointError: a layer is packed in the files and not in the model, or the reverse.
        ValueError: the scales of a layer were cast since the model was loaded.
    """
    packed = packed_modules(model)
    source = Source.of(model, packed.keys())
    if source is not None:
        source.require_whole(packed.keys())
        source.require_own_scales(packed)
    unreadable = [name for name, layer in packed.items() if repacked(layer)]
    quantizer = getattr(model, "hf_quantizer", None)
    if not unreadable or source is None or not isinstance(quantizer, GptqHfQuantizer):
        return
    logger.warning(
        "%d layers were packed for inference by %s: they are reloaded from %s, for the kernel gptq_torch.",
        len(unreadable),
        type(packed[unreadable[0]]).__name__,
        source.checkpoint.directory,
    )
    optimum = copy(quantizer.optimum_quantizer)
    optimum.backend = "gptq_torch"
    for name in unreadable:
        if name in source.layers:
            _reload(model, name, source, optimum)


def _reload(model: nn.Module, name: str, source: Source, optimum: Any) -> None:
    old: Any = model.get_submodule(name)
    stored = source.layers[name]
    tensors = source.checkpoint.packed(stored)
    packed = tensor_format(stored, tensors, stored_zero_offset(checkpoint_format(model) or "gptq"))
    bias = source.checkpoint.tensors.get(f"{stored}.bias")
    optimum.bits, optimum.group_size = packed.bits, packed.group_size if packed.groups > 1 else -1
    optimum.select_quant_linear(device_map=None, pack=False)
    layer: Any = optimum.quant_linear(
        packed.bits,
        optimum.group_size,
        packed.act_order,
        packed.symmetric,
        packed.in_features,
        packed.out_features,
        bias is not None,
    )
    offset = zero_offset(layer, name)
    state = tensors._replace(qzeros=convert_zeros(tensors.qzeros, packed.bits, packed.zero_offset, offset))._asdict()
    layer.load_state_dict(state if bias is None else {**state, "bias": bias.read()})
    layer.qzero_format(format=2 - offset)
    layer.post_init()
    device = next(buffer.device for buffer in old.buffers() if not buffer.is_meta)
    model.set_submodule(name, layer.to(device).train(old.training))


def _linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def _make_layer(
    layer: Any,
    name: str,
    stored: str,
    tensors: Mapping[str, StoredTensor],
    optimum: Any,
    kernel: Callable[[int, int], type[nn.Module]],
) -> Any:
    """A packed layer without values, of the shape, bits and group size that the files say."""
    in_features, out_features = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    shape = tensors[f"{stored}.qweight"].shape
    words, columns = shape if len(shape) == 2 else (0, 0)
    bits, rest = divmod(words * WORD_BITS, in_features)
    if columns != out_features or bits not in SUPPORTED_BITS or rest:
        raise InvalidCheckpointError(
            f"{stored}.qweight has shape {shape}, which is no weight of {in_features} in- and "
            f"{out_features} out-features, as {name} has, in 2, 3, 4 or 8 bits: the files are of another model than "
            "config.json. Download the checkpoint again."
        )
    scales = tensors.get(f"{stored}.scales")
    groups = scales.shape[0] if scales is not None and scales.shape else 1
    if not groups:
        raise InvalidCheckpointError(f"{stored}.scales has no groups: download the checkpoint again.")
    size = group_size(in_features, groups, optimum.group_size)
    packed: Any = kernel(bits, size)(
        bits,
        size,
        optimum.desc_act,
        optimum.sym,
        in_features,
        out_features,
        layer.bias is not None,
        weight_dtype=layer.weight.dtype,
    )
    if scales is not None and scales.torch_dtype != packed.scales.dtype:
        packed.scales = packed.scales.to(scales.torch_dtype)  # fp16, unless the files say otherwise
    packed.device = layer.weight.device
    if hasattr(packed, "weight"):
        packed.weight._is_hf_initialized = True  # a stand-in, which transformers would initialize
    return packed.to(layer.weight.device)
