"""PEQA models."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..model import PackedTuner
from .clamped import ClampedScales, count_clamped, describe_clamped
from .layer import PEQALayer, PEQALinear


class PEQAModel(PackedTuner):
    """Fine-tunes the quantization scales of a GPTQ model and leaves its integers unchanged.

    This is PEQA (Kim et al., 2023, arXiv 2305.14152). Because only scales change, the merged model is again a plain
    GPTQ checkpoint.

    Args:
        model: the GPTQ model, usually a [`~transformers.PreTrainedModel`] loaded with
            `GPTQConfig(bits=..., backend="gptq_torch")`.
        config ([`PEQAConfig`]): configuration of the adapter.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled when weights are loaded.

    Deltas are fp32, or with `autocast_adapter_dtype=False` in the model's dtype. Casting the model later does not
    change the dtype of deltas and base scales, because merging combines them.

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
        >>> model = get_peft_model(model, peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
        ```
    """

    prefix = "peqa_"
    tuner_layer_cls = PEQALayer
    linear_class = PEQALinear
    target_module_mapping: dict[str, list[str]] = {}

    def _check_merge_allowed(self) -> None:
        """Check all layers before merging the first, so that a damaged adapter leaves none of them merged."""
        super()._check_merge_allowed()
        layers = self._adapted_layers()
        for name, layer in layers.items():
            layer.check_finite(layer.active_adapters, name)
        clamped = describe_clamped(count_clamped(layers))
        if clamped:
            warnings.warn(f"Merging an adapter of which {clamped}.", stacklevel=4)

    def _monitor(self) -> ClampedScales:
        return ClampedScales(self._adapted_layers())

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        quantization_config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
        if merge and getattr(quantization_config, "backend", None) is not None:
            quantization_config.backend = "auto"  # serving the merged model does not need the training kernel
        return model

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose scale deltas are the weighted sum of those of other adapters, exactly.

        Args:
            adapters: names of the adapters to combine. A module that one of them has in `modules_to_save` is copied
                unchanged.
            weights: one weight per adapter; negative ones subtract.
            adapter_name: name of the new adapter. Nothing happens if it exists already.
            combination_type: `"linear"`.

        Raises:
            ValueError: an adapter or the combination is unknown, the number of weights is wrong, or a module is in the
                `modules_to_save` of more than one adapter, which cannot be combined.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type != "linear":
            raise ValueError(f"combination_type={combination_type!r}: scale deltas combine by 'linear' only.")
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights: expected a weight for each.")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name!r} does not exist; there are {sorted(self.peft_config)}.")
        modules_to_save = self._modules_to_save(adapters)
        layers = {
            name: layer
            for name, layer in self._adapted_layers().items()
            if any(adapter in layer.peqa_scales for adapter in adapters)
        }
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            target_modules=list(layers),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            init_weights=True,
            modules_to_save=modules_to_save,
            base_quantization=None,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in layers.values():
                for name, weight in zip(adapters, weights):
                    if name in layer.peqa_scales:
                        layer.peqa_scales[adapter_name].add_(layer.peqa_scales[name], alpha=weight)
        self._copy_modules(adapters, adapter_name)
        self.set_requires_grad(adapter_name, False)
