"""QFT among the quantizers of transformers: int8 checkpoints are saved and loaded by the stock calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer

from .checkpoint import PARTS, check_checkpoint, flatten
from .config import QUANT_METHOD, QFTConfig
from .policy import int8_modules
from .weight import Int8Weight


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SOURCES = {rf"\.{part}$": part for part in PARTS}


class QFTQuantizer(HfQuantizer):
    """Loads what [`QFTConfig`] describes: an int8 checkpoint as it is, a float one quantized weight by weight.

    Attributes:
        only_first_rows: have `save_pretrained` write the first row of each tensor, to try whether it can.

    Raises (from `from_pretrained`):
        InvalidCheckpointError: an int8 checkpoint is damaged or does not fit the policy in its config.
        ValueError: the model has no linear layer.
    """

    quantization_config: QFTConfig

    def __init__(self, quantization_config: QFTConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._int8: frozenset[str] = frozenset()
        self.only_first_rows = False

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
        return [WeightConverter(list(_SOURCES), r"\.weight", [_Assemble(self)])] if self.pre_quantized else []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors = flatten(model.state_dict())
        if self.only_first_rows:
            tensors = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in tensors.items()}
        return tensors, {"quant_method": QUANT_METHOD}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        modules: dict[str, Any] = int8_modules(model, self.quantization_config)
        self._int8 = frozenset(f"{name}.weight" for name in modules)
        if self.pre_quantized and checkpoint_files is not None:
            check_checkpoint(checkpoint_files, {name: tuple(layer.weight.shape) for name, layer in modules.items()})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # saving reverts what loading converted; int8 weights are taken apart by `get_state_dict_and_metadata`
        loaded: Any = model
        loaded._weight_conversions = [each for each in loaded._weight_conversions or [] if not _is_ours(each)]
        return model


class _Assemble(ConversionOps):
    """The parts in an int8 checkpoint to a weight."""

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
        parts = {_SOURCES[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        tensors: Any = {name: parts.get(name) for name in PARTS}
        return {full_layer_name: Int8Weight(**tensors, dtype=model.get_parameter(full_layer_name).dtype)}


class _Encode(ConversionOps):
    """A float weight to int8."""

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
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        config = self.hf_quantizer.quantization_config
        dtype = model.get_parameter(full_layer_name).dtype
        return {full_layer_name: Int8Weight.from_dense(weight, config.outlier_ratio, dtype)}


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Assemble) for operation in getattr(conversion, "operations", ()))


def attach_quantizer(model: Any, config: QFTConfig) -> None:
    """Let a model whose weights are int8 by now be saved as an int8 checkpoint, as if it had been loaded from one."""
    model.hf_quantizer = QFTQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.config._is_quantized = True
