"""LREC on a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraModel
from peft.utils.other import get_pattern_key

from ..packed import PackedTuner
from .config import FLOAT_STARTS, LRECConfig
from .layer import CANNOT_MERGE, LRECLinear


class LRECModel(PackedTuner, LoraModel):
    """Trains a low-rank branch beside the packed weights of a GPTQ model (the scheme of INT2.1, Chai et al., 2023,
    arXiv 2306.08162). The base stays as it is; no dense weight is kept for backward.

    Args:
        model: the GPTQ model, usually a [`~transformers.PreTrainedModel`] loaded with
            `GPTQConfig(bits=..., backend="gptq_torch")`.
        config ([`LRECConfig`]): what to train.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled when weights are loaded.

    Adapters are fp32, or with `autocast_adapter_dtype=False` of the model's dtype, and compute in the dtype of the
    layer's input (autocast's dtype where it is on). Their files have LoRA's keys; [`export_lora`] makes LoRA adapters
    of them.

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
        start = peft_config.init_lrec_weights
        # a saved adapter brings its weights along, and names its base
        if start in FLOAT_STARTS and not peft_config.inference_mode and peft_config.base_quantization is None:
            raise ValueError(
                f"init_lrec_weights={start!r} needs the float weights. Leave it out of the configuration, and call "
                f"`peft_quant.initialize_lrec_weights(model, float_model, start={start!r})` on the adapted model."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _layer_options(self, config: LRECConfig, name: str) -> dict[str, Any]:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        return {"r": rank, "lora_alpha": alpha}

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As LoRA's, also for adapters that choose their layers or scale their branches in different ways."""
        given = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
        # LoRA's gives the new adapter the first one's options, which are not all true of the combination
        for name, config in given.items():
            self.peft_config[name] = replace(
                config,
                target_modules=[key for key, layer in self._adapted_layers() if name in layer.lora_A],
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
                use_rslora=False,
                init_lora_weights=True,
                init_lrec_weights="zero",
                base_quantization=None,
            )
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self.peft_config.update(given)

    def _adapted_layers(self) -> list[tuple[str, LRECLinear]]:
        return [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, LRECLinear)]
