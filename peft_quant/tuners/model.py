"""Base class of the methods: target layers, matching of adapters to their base, mixed batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .. import gptq
from ..gptq.base_record import Layers, describe_base, digests, require_base
from ..gptq.dtypes import Apply, activation_dtype, warn_of_cast_scales, without_cast
from ..gptq.fingerprint import fingerprint
from ..gptq.loading import require_readable
from ..gptq.prepare import is_prepared
from ..gptq.source import Source, packed_modules
from ..gptq.zero_points import checkpoint_format, keep_checkpoint_format
from ..optimizer_steps import StepMonitor, skipped_steps, watch_steps
from ..patterns import require_quick_patterns
from ..registry import ask_for_weight, wrap_method
from .layer import AdaptedLinear
from .recorded_base import RecordedBase, copy_without_record, shared_config
from .switching import add_gate, remove_gate, switch


_ALL_LINEAR = "all-linear"
_SWITCHES = (
    "_unload_and_optionally_merge",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter_layers",
    "enable_adapter_layers",
    "inject_adapter",
    "merge_adapter",
    "set_adapter",
    "unmerge_adapter",
)


class PackedTuner(BaseTuner):
    """A method that adapts GPTQ layers. Errors in a model or an adapter are raised before the model changes.

    Attributes:
        linear_class: class of the method's layers, called as `linear_class(base_layer, adapter_name, config, packed,
            **options)`. Their `update_layer(adapter_name, config=config, **options)` adds further adapters.
    """

    linear_class: type[AdaptedLinear]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _SWITCHES:
            wrap_method(cls, name, switch)

    def _apply(self, fn: Apply, recurse: bool = True) -> Any:
        """Apply `fn`, but keep the dtype of the scales of all GPTQ layers, with or without an adapter."""
        scales = [getattr(layer, "scales", None) for layer in packed_modules(self.model).values()]
        return super()._apply(without_cast(fn, [kept for kept in scales if kept is not None]), recurse)

    def _adapted_layers(self) -> dict[str, Any]:
        """The method's layers, by name."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, self.linear_class)}

    def _layer_options(self, config: Any, name: str) -> dict[str, Any]:
        """Options of one layer."""
        return {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        require_readable(self.model)
        packed_layers = packed_modules(self.model)
        if not packed_layers:
            raise ValueError(_no_packed_layers(self.model, peft_config.peft_type.value))
        targets = peft_config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
            peft_config.target_modules = self._default_targets(peft_config, packed_layers)
        self._formats = self._read_targets(peft_config, packed_layers)
        if self._formats:
            self._match_base(peft_config, packed_layers)
        return peft_config

    def _default_targets(self, config: Any, packed_layers: dict[str, nn.Module]) -> set[str]:
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        endings = {name.rpartition(".")[2] for name in packed_layers}
        by_ending = replace(config, target_modules=endings)  # PEFT applies `layers_to_transform` to endings only
        return {
            name
            for name, layer in packed_layers.items()
            if layer is not head and self._check_target_module_exists(by_ending, name)
        }

    def _read_targets(self, config: Any, packed_layers: dict[str, nn.Module]) -> dict[str, gptq.PackedFormat]:
        """Formats of the targeted layers."""
        formats = {}
        inside_adapters: tuple[str, ...] = ()
        for name, module in self.model.named_modules():
            if not name or name.startswith(inside_adapters):
                continue
            if isinstance(module, BaseTunerLayer):
                inside_adapters += (f"{name}.",)
            if not self._check_target_module_exists(config, name):
                continue
            if isinstance(module, self.linear_class):
                formats[name] = module.packed
            elif isinstance(module, BaseTunerLayer):
                raise ValueError(
                    f"{name} has adapters of another method already ({type(module).__name__}), which "
                    f"{config.peft_type.value} does not go on top of. Take them off first, with `merge_and_unload()` "
                    "or `unload()`, or leave the layer out with `exclude_modules`."
                )
            elif name in packed_layers:
                formats[name] = gptq.read_format(module, name)
            elif not any(True for _ in module.children()):
                raise ValueError(
                    f"target_modules={config.target_modules!r} matches {name}, a {type(module).__name__} without "
                    f"GPTQ-packed weights, which {config.peft_type.value} cannot adapt. Leave it out with "
                    "`exclude_modules`, or train it whole with `modules_to_save`."
                )
        _warn_if_mislabelled(formats)
        warn_of_cast_scales(formats)
        return formats

    def _match_base(self, config: Any, packed_layers: dict[str, nn.Module]) -> dict[str, bytes]:
        """Record the base of a new adapter, or refuse an adapter that was trained on another base.

        Returns:
            The digests of the layers to adapt, by name; empty if the layers have no values.
        """
        layers = self._base_layers(self._formats, packed_layers)
        if layers is None:
            return {}
        layer_digests = digests(layers)
        source = Source.of(self.model, packed_layers.keys())
        found = describe_base(
            self._formats.values(),
            fingerprint(layer_digests.values()),
            checkpoint_format(self.model),
            None if source is None else source.digest(layers),
        )
        expected = config.base_quantization
        if expected is not None:
            require_base(expected, layers, found, config.base_model_name_or_path)
        config.base_quantization = RecordedBase(found) if expected is None else found
        return layer_digests

    def _base_layers(
        self, formats: dict[str, gptq.PackedFormat], packed_layers: dict[str, nn.Module]
    ) -> Layers | None:
        """The GPTQ layers without adapters, or None if they have no values."""
        layers = {}
        for name, packed in formats.items():
            adapted = self.model.get_submodule(name)
            is_adapted = isinstance(adapted, AdaptedLinear)
            layers[name] = adapted.base_tensors() if is_adapted else gptq.packed_tensors(packed_layers[name]), packed
        return None if any(tensors.qweight.is_meta for tensors, _ in layers.values()) else layers

    def require_base(self, adapter_name: str, recorded: Mapping[str, Any], base: str | None) -> None:
        """Check that the model is the base recorded by another adapter of the same layers.

        Args:
            adapter_name: a loaded adapter with these layers.
            recorded: `base_quantization` of the other adapter.
            base: name of the base in the other adapter's configuration.

        Raises:
            ValueError: the model is another base.
        """
        formats = {
            name: layer.packed
            for name, layer in self._adapted_layers().items()
            if layer.known_adapters([adapter_name])
        }
        layers = self._base_layers(formats, {})
        if layers:
            require_base(recorded, layers, self.peft_config[adapter_name].base_quantization, base)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        options = self._layer_options(peft_config, current_key)
        if isinstance(target, self.linear_class):
            target.update_layer(adapter_name, config=peft_config, **options)
            return
        packed = self._formats.get(current_key) or gptq.read_format(target, current_key)
        layer = self.linear_class(target, adapter_name, peft_config, packed, **options)
        layer.activation_dtype = activation_dtype(
            parameter for name, parameter in self.model.named_parameters() if self.prefix not in name
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight`, which GPTQ layers lack, to the new module
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        add_gate(model)
        given = self.peft_config[adapter_name]
        require_quick_patterns(vars(given), (name for name, _ in model.named_modules()))
        config = self.peft_config[adapter_name] = copy_without_record(given)
        given_targets = config.target_modules
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.peft_config[adapter_name] = shared_config(given, config, given_targets, self._formats)
        keep_checkpoint_format(model)
        if not config.inference_mode:
            watch_steps(model, AdaptedLinear, self._monitor())

    def _monitor(self) -> StepMonitor | None:
        """What looks at the adapters between optimizer steps."""
        return None

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps on the model's adapters that were skipped because gradients were not finite."""
        return skipped_steps(self)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter to fp32, or without autocasting to the dtype of the model (of its scales if it has none)."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        dtype = self.model.dtype if isinstance(self.model, PreTrainedModel) else None
        for layer in self._adapted_layers().values():
            layer.cast_adapter(adapter_name, dtype or layer.base_tensors().scales.dtype)

    def _modules_to_save(self, adapters: list[str]) -> list[str] | None:
        """The `modules_to_save` of a combination of adapters.

        Raises:
            ValueError: two adapters have the same module.
        """
        shared = [
            wrapper for wrapper in self._wrappers() if sum(name in wrapper.modules_to_save for name in adapters) > 1
        ]
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{len(shared)} such instance(s)."
            )
        names = [module for name in adapters for module in self.peft_config[name].modules_to_save or []]
        return list(dict.fromkeys(names)) or None

    def _copy_modules(self, adapters: list[str], adapter_name: str) -> None:
        """Copy the adapters' `modules_to_save` to their combination, whose modules PEFT copied from the base."""
        for wrapper in self._wrappers():
            for name in adapters:
                if name in wrapper.modules_to_save:
                    state_dict = wrapper.modules_to_save[name].state_dict()
                    wrapper.modules_to_save[adapter_name].load_state_dict(state_dict)

    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_gate(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, one name (or "__base__") per sample, to the layers: mixed batches at inference."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: call `model.eval()` first."
            )
        layers = self._adapted_layers().values()
        known = {name for layer in layers for name in layer.known_adapters(list(self.peft_config))} | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {sorted(known)}."
            )
        has_encoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder_modules = set(self.model.get_encoder().modules()) if has_encoder else set()
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = []
        for module in self.modules():
            if isinstance(module, (self.linear_class, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in encoder_modules else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


ask_for_weight(is_prepared)


def _warn_if_mislabelled(formats: dict[str, gptq.PackedFormat]) -> None:
    """Warn if symmetric zero points are stored in one format but declared as the other, which ruins the model."""
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


def _no_packed_layers(model: nn.Module, peft_type: str) -> str:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    name = type(model).__name__
    if method not in (None, "gptq"):
        return (
            f"{peft_type} adapts GPTQ-packed layers, and {name} is quantized with {method}. Load a GPTQ checkpoint of "
            f"the same model{_AS_GPTQ.get(method, '')}, or train this one with PEFT's own methods, such as LoRA."
        )
    return (
        f"{peft_type} adapts GPTQ-packed layers, and {name} has none. Load a GPTQ checkpoint with "
        '`quantization_config=GPTQConfig(bits=..., backend="gptq_torch")`, or quantize the float model first: '
        "`peft-quant quantize MODEL OUT`."
    )


_AS_GPTQ = {
    "auto-round": " (AutoRound exports one with `format='auto_gptq'`)",
    "qft": " (`trainer.export(directory, 'gptq')` writes one), or train it with QFTTrainer",
}


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
