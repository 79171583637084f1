"""LREC models."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import LoraModel
from peft.utils.other import get_pattern_key
from torch import nn

from ... import gptq
from ...compat import peft_saves_biases, validate_lora_state_dict
from ...gptq.base_record import digests
from ...gptq.fingerprint import fingerprint
from ..model import PackedTuner
from .config import FLOAT_INITIALIZATIONS, LRECConfig
from .layer import CANNOT_MERGE, LRECLinear


class LRECModel(PackedTuner, LoraModel):
    """Trains a low-rank adapter beside the packed weights of a GPTQ model.

    This is the scheme of INT2.1 (Chai et al., 2023, arXiv 2306.08162). The base stays unchanged, and no dense weight
    is kept for backward.

    Args:
        model: the GPTQ model, usually a [`~transformers.PreTrainedModel`] loaded with
            `GPTQConfig(bits=..., backend="gptq_torch")`.
        config ([`LRECConfig`]): configuration of the adapter.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled when weights are loaded.

    Adapters are fp32, or with `autocast_adapter_dtype=False` in the model's dtype, and compute in the dtype of the
    layer's input (autocast's dtype if it is enabled). Their files have LoRA's keys; [`export_lora`] converts them to
    LoRA adapters.

    Raises:
        ValueError: the model has no GPTQ layers, a targeted layer is not one, or the adapter belongs to another base.
        RepackedLayerError: a targeted layer's kernel changed its packed tensors.
        InvalidCheckpointError: a targeted layer's packed tensors are damaged.

    Example:
        ```py
        >>> import peft_quant
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, GPTQConfig

        >>> kernel = GPTQConfig(bits=4, backend="gptq_torch")
        >>> model = AutoModelForCausalLM.from_pretrained("user/model-gptq-4bit", quantization_config=kernel)
        >>> model = get_peft_model(model, peft_quant.LRECConfig(task_type="CAUSAL_LM", r=16))
        ```
    """

    tuner_layer_cls = LRECLinear
    linear_class = LRECLinear
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: LRECConfig, model_config: dict[str, Any]) -> LRECConfig:
        peft_config.refuse_other_lora_options()
        if peft_config.bias != "none" and not peft_saves_biases():
            raise ValueError(
                f"bias={peft_config.bias!r} needs PEFT 0.21: older ones do not save the biases. Update PEFT, or leave "
                "`bias` out."
            )
        start = peft_config.init_lrec_weights
        # a saved adapter has its weights already, and names its base
        if start in FLOAT_INITIALIZATIONS and not peft_config.inference_mode and peft_config.base_quantization is None:
            raise ValueError(
                f"init_lrec_weights={start!r} needs the float weights. Leave it out of the configuration, and call "
                f"`peft_quant.initialize_lrec_weights(model, float_model, start={start!r})` on the adapted model."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _match_base(self, config: LRECConfig, packed_layers: dict[str, nn.Module]) -> dict[str, bytes]:
        of_adapted = super()._match_base(config, packed_layers)
        others = {name: layer for name, layer in packed_layers.items() if name not in self._formats}
        try:
            formats = {name: gptq.read_format(layer, name) for name, layer in others.items()}
        except (gptq.RepackedLayerError, ValueError):
            config.base_fingerprint = None  # some layer without an adapter cannot be read
            return of_adapted
        layers = self._base_layers(formats, packed_layers)
        if of_adapted and layers is not None:
            config.base_fingerprint = fingerprint([*of_adapted.values(), *digests(layers).values()])
        return of_adapted

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        if any(config.bias != "none" for config in self.peft_config.values()):
            for layer in self._adapted_layers().values():
                layer.free_bias()
        super()._mark_only_adapters_as_trainable(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        bias = self.peft_config[adapter_name].bias
        if bias == "all":
            found = any(name.endswith("bias") for name, _ in model.named_parameters())
        else:
            found = bias == "none" or any(layer.bias is not None for layer in self._adapted_layers().values())
        if not found:
            warnings.warn(f"bias={bias!r}, but there are no biases to train: the option does nothing.", stacklevel=2)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, adapter_name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        state_dict = super()._get_adapter_state_dict(*args, adapter_name=adapter_name, **kwargs)
        validate_lora_state_dict(state_dict, adapter_name)  # PEFT checks only its own LoRA's
        return state_dict

    def _layer_options(self, config: LRECConfig, name: str) -> dict[str, Any]:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        return {"r": rank, "lora_alpha": alpha}

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Combine adapters as LoRA does, also if their target layers or scalings differ.

        A module that one of them has in `modules_to_save` is copied unchanged.
        """
        if adapter_name in self.peft_config:
            return
        given = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
        for name, config in given.items():
            if config.bias != "none":
                raise ValueError(
                    f"Adapter {name!r} trains biases (bias={config.bias!r}), which cannot be combined. Combine "
                    "adapters without."
                )
        modules_to_save = self._modules_to_save(list(given))
        # LoRA's method copies the first adapter's options, not all of which apply to the combination
        for name, config in given.items():
            self.peft_config[name] = replace(
                config,
                target_modules=[key for key, layer in self._adapted_layers().items() if name in layer.lora_A],
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
                use_rslora=False,
                init_lora_weights=True,
                init_lrec_weights="zero",
                base_quantization=None,
                modules_to_save=modules_to_save,
            )
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
            self._copy_modules(adapters, adapter_name)
        finally:
            self.peft_config.update(given)
        for layer in self._adapted_layers().values():
            if adapter_name in layer.lora_A:
                for matrix in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
                    # the `svd` combination is a strided view that keeps all singular vectors alive
                    matrix.weight.data = matrix.weight.data.clone(memory_format=torch.contiguous_format)
