"""The transformers quantizer of QFT: `save_pretrained` and `from_pretrained` of int8 models."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer

from ..gptq.names import conversions_of, with_experts_apart
from .checkpoint import PARTS, PATTERNS, check_checkpoint, flatten, part_names
from .config import QUANT_METHOD, QFTConfig
from .names import conversions_apart_from, conversions_to_revert, parameters_of, saved_as
from .policy import int8_modules
from .weight import Int8Weight


class QFTQuantizer(HfQuantizer):
    """Loads a model with a [`QFTConfig`]: an int8 checkpoint unchanged, a float one quantized weight by weight.

    A weight that the checkpoint lacks, such as that of a pooler under a new head, is initialized by transformers and
    then quantized.

    Attributes:
        only_first_rows: whether `save_pretrained` writes only the first row of each tensor, for a dry run.
        conversions: the conversions that saving the model in float would revert. Saving in int8 skips those that
            compute from int8 weights, and writes these weights under their names in the model.

    Raises (from `from_pretrained`):
        InvalidCheckpointError: an int8 checkpoint is damaged or does not fit the policy in its config.
        ValueError: the model has no linear layer.

    Raises (from `save_pretrained`):
        ValueError: the int8 weights are not those that the policy in the config selects, so loading would fail.
    """

    quantization_config: QFTConfig

    def __init__(self, quantization_config: QFTConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._int8: frozenset[str] = frozenset()
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._loading: tuple[PreTrainedModel, list[str]] | None = None  # the model, and the files to check
        self.only_first_rows = False
        self.conversions: list[WeightTransform] = []

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "int8 weights cannot be offloaded to disk. Load the model with a `device_map` without 'disk'."
            )

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        return 1 if param_name in self._int8 else super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._int8

    def get_quantize_ops(self) -> ConversionOps:
        return _Encode(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [self._assembly()] if self.pre_quantized else []

    def _assembly(self) -> WeightConverter:
        return WeightConverter(list(PATTERNS), r"\.weight", [_Assemble(self)])

    def update_weight_conversions(
        self,
        weight_conversions: list[WeightTransform],
        *_: PreTrainedModel,  # from transformers 5.23 on
    ) -> list[WeightTransform]:
        if self.quantization_config.experts_apart:
            weight_conversions = with_experts_apart(weight_conversions)
        # the first conversion that matches a name is used, so int8 parts come first
        conversions = [*self.get_weight_conversions(), *weight_conversions]
        if self._loading is not None:
            model, files = self._loading
            self._loading = None
            check_checkpoint(files, model, conversions, self._int8)
        return conversions

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if not getattr(model, "_hf_peft_config_loaded", False):  # if loaded, only adapters are saved
            _require_policy(model, self.quantization_config)
            self._check_names(model)
        tensors = flatten(model.state_dict(), getattr(model, "all_tied_weights_keys", {}))
        if self.only_first_rows:
            tensors = {name: _first_row(tensor) for name, tensor in tensors.items()}
        return tensors, {"quant_method": QUANT_METHOD}

    def _check_names(self, model: Any) -> None:
        codes = {name: part_names(name)[0] for name in int8_names(model)}
        saved = saved_as(codes.values(), model._weight_conversions)
        loading = [self._assembly(), *conversions_of(model)]
        found = parameters_of(saved.values(), model, loading)
        lost = [name for name, part in codes.items() if found[saved[part]] != ([name], rf"\.{PARTS[0]}$")]
        if lost:
            raise ValueError(
                f"transformers renames {len(lost)} weights of a {type(model).__name__}, first {lost[0]}, so that they "
                "could not be loaded in int8. Leave them in float by QFTConfig(modules_to_not_convert=...), and "
                "quantize the model again."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.experts_apart:
            from defuser import convert_model

            convert_model(model)
        self._int8 = frozenset(f"{name}.weight" for name in int8_modules(model, self.quantization_config))
        self._expected = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
        if self.pre_quantized and checkpoint_files is not None:
            self._loading = model, checkpoint_files

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._quantize_new(model)
        self._check_floats(model)
        self.choose_conversions(model)
        return model

    def _quantize_new(self, model: PreTrainedModel) -> None:
        encoded: dict[int, nn.Parameter] = {}  # by id, to keep ties
        for name in sorted(self._int8):
            weight = model.get_parameter(name)
            if isinstance(weight, Int8Weight) or weight.is_meta:
                continue
            if id(weight) not in encoded:
                int8 = Int8Weight.from_dense(weight, self.quantization_config.outlier_ratio)
                encoded[id(weight)] = nn.Parameter(int8, requires_grad=weight.requires_grad)
            model.get_submodule(name.rpartition(".")[0]).weight = encoded[id(weight)]

    def _check_floats(self, model: PreTrainedModel) -> None:
        """Refuse mismatched shapes and cast renamed tensors, which transformers 5.14 omits for quantized models."""
        for name, (shape, dtype) in self._expected.items():
            parameter = model.get_parameter(name)
            if parameter.shape != shape:
                raise ValueError(
                    f"{name} has the shape {tuple(parameter.shape)} in the checkpoint, and {tuple(shape)} in a "
                    f"{type(model).__name__} of this config: load it with the config it was saved with."
                )
            if isinstance(parameter, Int8Weight) or parameter.dtype == dtype:
                continue
            if not any(re.search(kept, name) for kept in model._get_dtype_plan(dtype)):
                parameter.data = parameter.data.to(dtype)

    def choose_conversions(self, model: PreTrainedModel) -> None:
        """Choose which of the model's conversions `save_pretrained` reverts."""
        names = int8_names(model)
        names += [part for name in names for part in part_names(name)]
        self.conversions = conversions_to_revert(model, names)
        saving: Any = model
        saving._weight_conversions = conversions_apart_from(names, self.conversions)


class _Assemble(ConversionOps):
    """Assembles a weight from its parts in an int8 checkpoint."""

    def __init__(self, hf_quantizer: QFTQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Assemble:
        return self  # transformers copies conversions for every weight; this one has no state

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        parts = {PATTERNS[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        tensors: Any = {name: parts.get(name) for name in PARTS}
        return {full_layer_name: Int8Weight(**tensors, dtype=model.get_parameter(full_layer_name).dtype)}


class _Encode(ConversionOps):
    """Encodes float weights that the policy puts in int8."""

    def __init__(self, hf_quantizer: QFTQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        ratio = self.hf_quantizer.quantization_config.outlier_ratio
        weights = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {
            name: Int8Weight.from_dense(weight, ratio, model.get_parameter(name).dtype)
            if self.hf_quantizer.param_needs_quantization(model, name)
            else weight
            for name, weight in weights.items()
        }


def _first_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[(slice(1),) * max(tensor.ndim - 1, 1)] if tensor.ndim else tensor


def int8_names(model: nn.Module) -> list[str]:
    """The names of a model's int8 weights; every name of tied ones."""
    parameters = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if isinstance(parameter, Int8Weight)]


def _require_policy(model: PreTrainedModel, config: QFTConfig) -> None:
    """Raise a `ValueError` if a checkpoint of the model would contradict its config."""
    policy = [f"{name}.weight" for name in int8_modules(model, config)]
    in_policy = {id(model.get_parameter(name)) for name in policy}
    in_float = [name for name in policy if not isinstance(model.get_parameter(name), Int8Weight)]
    in_int8 = [name for name in int8_names(model) if id(model.get_parameter(name)) not in in_policy]
    for names, state, expected in ((in_float, "float", "int8"), (in_int8, "int8", "float")):
        if names:
            raise ValueError(
                f"{len(names)} weights, first {names[0]}, are in {state} and in {expected} by the model's "
                f"quantization config, so that its checkpoint could not be loaded: they were replaced after the model "
                "was quantized. Quantize it as it now is (`convert_to_int8` on the float model), or name what is to "
                "stay in float in QFTConfig(modules_to_not_convert=...)."
            )


def attach_quantizer(model: Any, config: QFTConfig) -> None:
    """Let a converted model save int8 checkpoints, as if it had been loaded from one."""
    model.hf_quantizer = QFTQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.config._is_quantized = True
    if isinstance(model, PreTrainedModel):
        model.hf_quantizer.choose_conversions(model)
