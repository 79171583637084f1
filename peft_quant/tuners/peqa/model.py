"""PEQA on a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ... import gptq
from ...gptq.fingerprint import fingerprint, layer_digest
from ...gptq.zero_points import checkpoint_format, keep_checkpoint_format
from ..proof import prove_first_step
from .config import PEQAConfig
from .layer import PEQALayer, PEQALinear


_ALL_LINEAR = "all-linear"
_BASE_LAYER_SUFFIX = ".base_layer"


class PEQAModel(BaseTuner):
    """Fine-tunes the quantization scales of a GPTQ model and leaves its integers alone (PEQA, Kim et al., 2023, arXiv
    2305.14152). Because only scales change, the merged model is again a plain GPTQ checkpoint.

    Args:
        model: the GPTQ model, usually a [`~transformers.PreTrainedModel`] loaded with
            `GPTQConfig(bits=..., backend="gptq_torch")`.
        config ([`PEQAConfig`]): what to train.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled when weights are loaded.

    Deltas are always fp32, whatever `autocast_adapter_dtype` asks for: most updates of a 16-bit scale would round to
    nothing.

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
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PEQAConfig, model_config: dict[str, Any]) -> PEQAConfig:
        packed_layers = self._packed_layers()
        if not packed_layers:
            raise ValueError(_no_packed_layers(self.model))
        # a copy, because what is filled in here belongs to this base, and the user may reuse the config on another
        peft_config, given = copy(peft_config), peft_config
        self.peft_config.update({name: peft_config for name, config in self.peft_config.items() if config is given})
        target = peft_config.target_modules
        if target is None or (isinstance(target, str) and target.lower() == _ALL_LINEAR):
            peft_config.target_modules = self._default_targets(peft_config, packed_layers)
        self._formats = self._read_targets(peft_config, packed_layers)
        if self._formats:
            self._match_base(peft_config, packed_layers)
        return peft_config

    def _default_targets(self, config: PEQAConfig, packed_layers: dict[str, nn.Module]) -> set[str]:
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        endings = {name.rpartition(".")[2] for name in packed_layers}
        by_ending = replace(config, target_modules=endings)  # PEFT applies `layers_to_transform` to endings only
        return {
            name
            for name, layer in packed_layers.items()
            if layer is not head and self._check_target_module_exists(by_ending, name)
        }

    def _packed_layers(self) -> dict[str, nn.Module]:
        """GPTQ layers by the name they have in the model without adapters."""
        return {
            name.removesuffix(_BASE_LAYER_SUFFIX): module
            for name, module in self.model.named_modules()
            if gptq.is_packed(module)
        }

    def _read_targets(self, config: PEQAConfig, packed_layers: dict[str, nn.Module]) -> dict[str, gptq.PackedFormat]:
        """Formats of the targeted layers; every error a layer can cause is raised here, before the model changes."""
        formats = {}
        inside_adapters: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            if not name or name.startswith(inside_adapters):
                continue
            if isinstance(module, PEQALayer):
                inside_adapters += (f"{name}.",)
            if not self._check_target_module_exists(config, name):
                continue
            if isinstance(module, PEQALayer):
                formats[name] = module.packed
            elif name in packed_layers:
                formats[name] = gptq.read_format(module, name)
            elif not any(True for _ in module.children()):
                raise ValueError(
                    f"target_modules={config.target_modules!r} matches {name}, a {type(module).__name__} without "
                    "GPTQ-packed weights, so there are no scales to train. Leave it out with `exclude_modules`, or "
                    "train it whole with `modules_to_save`."
                )
        _warn_if_mislabelled(formats)
        return formats

    def _match_base(self, config: PEQAConfig, packed_layers: dict[str, nn.Module]) -> None:
        """Record the base an adapter is for, or refuse one that was trained on another."""
        layers = {name: packed_layers[name] for name in self._formats}
        if any(gptq.packed_tensors(layer).qweight.is_meta for layer in layers.values()):
            return
        digests = []
        for name, layer in layers.items():
            tensors = gptq.packed_tensors(layer)
            wrapper = self.model.get_submodule(name)
            if isinstance(wrapper, PEQALayer):
                tensors = tensors._replace(scales=wrapper.base_scales)
            packed = self._formats[name]
            digests.append(layer_digest(tensors, packed.bits, packed.zero_offset))
        found = describe_base(list(self._formats.values()), checkpoint_format(self.model), fingerprint(digests))
        expected = config.base_quantization
        if expected is not None and expected.get("fingerprint") != found["fingerprint"]:
            raise ValueError(
                f"This adapter was trained on another base model: it expects {expected}, this model is {found}. Load "
                f"the base it was trained on ({config.base_model_name_or_path}), unchanged."
            )
        config.base_quantization = found

    def _create_and_replace(
        self,
        peft_config: PEQAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PEQALayer):
            target.update_layer(adapter_name, peft_config)
            return
        packed = self._formats.get(current_key) or gptq.read_format(target, current_key)
        layer = PEQALinear(target, adapter_name, peft_config, packed)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies `weight` to the new module, which GPTQ layers do not have
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        keep_checkpoint_format(model)
        if not self.peft_config[adapter_name].inference_mode:
            prove_first_step(model, PEQALayer)

    def _check_merge_allowed(self) -> None:
        """Check all layers before the first is merged, so that a damaged adapter leaves none of them merged."""
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, PEQALayer):
                layer.check_finite(layer.active_adapters, name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        quantization_config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
        if merge and getattr(quantization_config, "backend", None) is not None:
            quantization_config.backend = "auto"  # whoever serves the merged model need not use the training kernel
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one name (or "__base__") a sample, to the layers: mixed batches at inference."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` is for inference: call `model.eval()` first.")
        layers = [module for module in self.modules() if isinstance(module, PEQALayer)]
        known = {name for layer in layers for name in layer.peqa_scales} | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"`adapter_names` has unknown adapters {unknown}; there are {sorted(known)}.")
        has_encoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder_modules = set(self.model.get_encoder().modules()) if has_encoder else set()
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = []
        for module in self.modules():
            if isinstance(module, (PEQALayer, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in encoder_modules else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose scale deltas are the weighted sum of those of other adapters. Exact: deltas are linear.

        Args:
            adapters: names of the adapters to combine.
            weights: one weight an adapter; negative ones subtract.
            adapter_name: name of the new adapter. Nothing happens if there is one of that name.
            combination_type: `"linear"`.

        Raises:
            ValueError: an unknown adapter or combination, a wrong number of weights, or `modules_to_save`, which
                cannot be combined.
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
            if self.peft_config[name].modules_to_save:
                raise ValueError(f"Adapter {name!r} has modules_to_save, which cannot be combined.")
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, PEQALayer) and any(adapter in layer.peqa_scales for adapter in adapters)
        }
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            target_modules=list(layers),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            init_weights=True,
            base_quantization=None,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in layers.values():
                for name, weight in zip(adapters, weights):
                    if name in layer.peqa_scales:
                        layer.peqa_scales[adapter_name].add_(layer.peqa_scales[name], alpha=weight)
        self.set_requires_grad(adapter_name, False)


def describe_base(
    formats: list[gptq.PackedFormat], declared_format: str | None, base_fingerprint: str
) -> dict[str, Any]:
    """What an adapter records of the base it was trained on, JSON-stable."""

    def summary(values: set[Any]) -> Any:
        return values.pop() if len(values) == 1 else sorted(values)

    return {
        "bits": summary({packed.bits for packed in formats}),
        "group_size": summary({packed.group_size for packed in formats if packed.groups > 1} or {-1}),
        "sym": all(packed.symmetric for packed in formats),
        "desc_act": any(packed.act_order for packed in formats),
        "checkpoint_format": declared_format,
        "fingerprint": base_fingerprint,
    }


def _warn_if_mislabelled(formats: dict[str, gptq.PackedFormat]) -> None:
    """Some checkpoints hold symmetric zero points in one format and declare the other; the model is then useless."""
    suspects = [
        name
        for name, packed in formats.items()
        if packed.zero_point is not None and abs(packed.zero_point - (1 << (packed.bits - 1))) == 1
    ]
    if suspects:
        warnings.warn(
            f"Every zero point of {suspects[0]} and {len(suspects) - 1} more layers is off the middle by exactly one: "
            "the checkpoint most likely declares the wrong zero point format. Try the other value ('gptq' or "
            "'gptq_v2') of `checkpoint_format` in the quantization_config of its config.json.",
            stacklevel=2,
        )


def _no_packed_layers(model: nn.Module) -> str:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    return (
        f"PEQA trains the scales of GPTQ-packed layers, and {type(model).__name__} has none (quantization: {method}). "
        'Load a GPTQ checkpoint with `quantization_config=GPTQConfig(bits=..., backend="gptq_torch")`, or quantize '
        "the float model first: `GPTQConfig(bits=4, dataset=[...], tokenizer=...)`."
    )


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
