"""What the methods share: finding the GPTQ layers to adapt, matching an adapter with its base, batches of adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from .. import gptq
from ..first_step import prove_first_step
from ..gptq.base_record import Layers, describe_base, digests, require_base
from ..gptq.dtypes import Apply, activation_dtype, after_cast, warn_of_cast_scales, weight_without_values, without_cast
from ..gptq.fingerprint import fingerprint
from ..gptq.loading import require_readable
from ..gptq.prepare import is_prepared
from ..gptq.source import Source, packed_modules
from ..gptq.zero_points import checkpoint_format, keep_checkpoint_format
from ..registry import ask_for_weight, check_adapters
from .saved import require_trained


_ALL_LINEAR = "all-linear"


class FilledIn(dict[str, Any]):
    """The `base_quantization` of a config that a model in memory filled in. One that was loaded is a plain dict.

    A loaded one names the only base the config is good for. This one only says what the model is, and how the config
    was before, so that the config can be used on another base too.

    Attributes:
        base_name: the model's `base_model_name_or_path`.
        given_targets: `target_modules` before.
        targets: `target_modules` since.
        layers: the names of the adapted layers.
    """

    base_name: str | None = None
    given_targets: Any = None
    targets: Any = None
    layers: frozenset[str] = frozenset()


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A GPTQ linear layer with adapters.

    Attributes:
        base_layer: the GPTQ layer.
        packed: the format of the GPTQ layer.
        activation_dtype: what the model computes in, and so the dtype of `weight`.
        first_to_move: the containers, among `adapter_layer_names`, that the first optimizer step must change.
    """

    base_layer: nn.Module
    packed: gptq.PackedFormat
    activation_dtype: torch.dtype = torch.float32
    first_to_move: tuple[str, ...]
    adapter_layer_names: tuple[str, ...]

    active_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    unmerge: Callable[[], None]
    update_layer: Callable[..., None]

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """`[..., K]` to `[..., N]` under the given adapters, which are the layer's own and not merged."""
        raise NotImplementedError

    def own(self, adapter_names: list[str]) -> list[str]:
        """Those of the given adapters that the layer has."""
        raise NotImplementedError

    def base_tensors(self) -> gptq.PackedTensors:
        """The packed tensors of the base model, whether or not adapters are merged into them."""
        return gptq.packed_tensors(self.get_base_layer())

    @property
    def weight(self) -> torch.Tensor:
        """The shape, the device and the dtype of the weight, for code that asks for these; it has no values."""
        return weight_without_values(self.get_base_layer(), self.packed, self.activation_dtype)

    def kept_from_casts(self) -> list[torch.Tensor]:
        """Those of the layer's tensors whose dtype stays when the model is cast."""
        return [gptq.packed_tensors(self.get_base_layer()).scales]

    def _apply(self, fn: Apply, recurse: bool = True) -> Any:
        self.activation_dtype = after_cast(fn, self.activation_dtype)
        return super()._apply(without_cast(fn, self.kept_from_casts()), recurse)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Change the dtype of an adapter's parameters, which stay the same objects."""
        for container in self.adapter_layer_names:
            adapters = getattr(self, container)
            if adapter_name in adapters:
                adapter = adapters[adapter_name]
                for parameter in [adapter] if isinstance(adapter, nn.Parameter) else adapter.parameters():
                    parameter.data = parameter.data.to(dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.adapted_forward(x, [])
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names)
        return self.adapted_forward(x, [] if self.merged else self.own(self.active_adapters))

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        outputs: dict[str, torch.Tensor] = {}
        rows = torch.empty(len(x), dtype=torch.long)
        order: list[int] = []
        for name in dict.fromkeys(adapter_names):
            indices = [i for i, sample_adapter in enumerate(adapter_names) if sample_adapter == name]
            outputs[name] = self.adapted_forward(x[indices], self.own([name]))
            order += indices
        rows[torch.tensor(order)] = torch.arange(len(x))
        return torch.cat(list(outputs.values()))[rows.to(x.device)]

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight, decoded: fp32 `[out_features, in_features]`."""
        return gptq.dequantize(self.get_base_layer(), self.packed)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        raise TypeError("The weight of a GPTQ layer is packed; it cannot be replaced by a dense one.")


class PackedTuner(BaseTuner):
    """A method that adapts GPTQ layers. What a model or an adapter gets wrong is raised before the model changes.

    Attributes:
        linear_class: the method's layer, made as `linear_class(base_layer, adapter_name, config, packed, **options)`
            and given further adapters by `update_layer(adapter_name, config=config, **options)`.
    """

    linear_class: type[AdaptedLinear]

    def _apply(self, fn: Apply, recurse: bool = True) -> Any:
        """Casts leave the scales of all GPTQ layers in their dtype, of those without an adapter too."""
        scales = [getattr(layer, "scales", None) for layer in packed_modules(self.model).values()]
        return super()._apply(without_cast(fn, [kept for kept in scales if kept is not None]), recurse)

    def _layer_options(self, config: Any, name: str) -> dict[str, Any]:
        """Options of one layer."""
        return {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        require_readable(self.model)
        packed_layers = packed_modules(self.model)
        if not packed_layers:
            raise ValueError(_no_packed_layers(self.model, peft_config.peft_type.value))
        given, config = peft_config, copy(peft_config)
        before = given.base_quantization
        if isinstance(before, FilledIn):
            config.base_quantization = None
            if config.target_modules == before.targets:
                config.target_modules = before.given_targets
        given_targets = config.target_modules
        if given_targets is None or (isinstance(given_targets, str) and given_targets.lower() == _ALL_LINEAR):
            config.target_modules = self._default_targets(config, packed_layers)
        self._formats = self._read_targets(config, packed_layers)
        if self._formats:
            self._match_base(config, packed_layers)
        found = config.base_quantization
        if isinstance(found, FilledIn):
            found.base_name, found.given_targets = config.base_model_name_or_path, given_targets
            found.layers, found.targets = frozenset(self._formats), config.target_modules
        if isinstance(before, FilledIn):
            same = {**vars(given), "target_modules": None} == {**vars(config), "target_modules": None}
            if same and (before.base_name, before.layers) == (found.base_name, found.layers):
                given.base_quantization = found
                return given
            # the config goes on being the other model's, whose name PEFT has just replaced by this one's
            given.base_model_name_or_path = before.base_name
            (*_, adapter_name) = (name for name, entered in self.peft_config.items() if entered is given)
            self.peft_config[adapter_name] = config
            return config
        vars(given).update(vars(config))
        return given

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
        """Record the base an adapter is for, or refuse one that was trained on another.

        Returns:
            The digests of the layers to adapt, by name, or none without values.
        """
        layers = self._base_layers(self._formats, packed_layers)
        if layers is None:
            return {}
        of_layers = digests(layers)
        source = Source.of(self.model, packed_layers.keys())
        found = describe_base(
            self._formats.values(),
            fingerprint(of_layers.values()),
            checkpoint_format(self.model),
            None if source is None else source.digest(layers),
        )
        expected = config.base_quantization
        if expected is not None:
            require_base(expected, layers, found, config.base_model_name_or_path)
        config.base_quantization = FilledIn(found) if expected is None else found
        return of_layers

    def _base_layers(
        self, formats: dict[str, gptq.PackedFormat], packed_layers: dict[str, nn.Module]
    ) -> Layers | None:
        """GPTQ layers as they are without adapters, or None without values."""
        layers = {}
        for name, packed in formats.items():
            adapted = self.model.get_submodule(name)
            is_adapted = isinstance(adapted, AdaptedLinear)
            layers[name] = adapted.base_tensors() if is_adapted else gptq.packed_tensors(packed_layers[name]), packed
        return None if any(tensors.qweight.is_meta for tensors, _ in layers.values()) else layers

    def require_base(self, adapter_name: str, recorded: Mapping[str, Any], base: str | None) -> None:
        """Check that the model is the base that another adapter of the same layers recorded.

        Args:
            adapter_name: a loaded adapter with these layers.
            recorded: `base_quantization` of the other one.
            base: what it calls its base.

        Raises:
            ValueError: it is another base.
        """
        adapted = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, self.linear_class) and layer.own([adapter_name])
        }
        layers = self._base_layers({name: layer.packed for name, layer in adapted.items()}, {})
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
        # PEFT's own copies `weight` to the new module, which GPTQ layers do not have
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if isinstance(config.base_quantization, FilledIn):
            config.base_quantization.targets = config.target_modules  # PEFT shortens long sets of names
        keep_checkpoint_format(model)
        if not config.inference_mode:
            prove_first_step(model, self.linear_class)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """fp32, or without autocasting the dtype of the model, of its scales where it has none."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        dtype = self.model.dtype if isinstance(self.model, PreTrainedModel) else None
        for layer in self.modules():
            if isinstance(layer, self.linear_class):
                layer.cast_adapter(adapter_name, dtype or layer.base_tensors().scales.dtype)

    def _modules_to_save(self, adapters: list[str]) -> list[str] | None:
        """The `modules_to_save` of a combination of adapters.

        Raises:
            ValueError: two of them have the same one.
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

    def _take_over_modules(self, adapters: list[str], adapter_name: str) -> None:
        """Give a combination the modules that one of the adapters trained whole; PEFT gave it copies of the base's."""
        for wrapper in self._wrappers():
            for name in adapters:
                if name in wrapper.modules_to_save:
                    state_dict = wrapper.modules_to_save[name].state_dict()
                    wrapper.modules_to_save[adapter_name].load_state_dict(state_dict)

    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one name (or "__base__") a sample, to the layers: mixed batches at inference."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: call `model.eval()` first."
            )
        layers = [module for module in self.modules() if isinstance(module, self.linear_class)]
        known = {name for layer in layers for name in layer.own(list(self.peft_config))} | {"__base__"}
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


def _check_saved(
    model: PreTrainedModel | PeftModel, path: str, adapter_name: str, given: Any, hub_options: dict[str, Any]
) -> None:
    """Check an adapter's files before it is loaded; see [`check_adapters`]."""
    try:
        config: Any = PeftConfig.from_pretrained(path, **hub_options)
    except ValueError:  # it has no configuration of its own, which PEFT does not need if it is given one
        config = given
    if not issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(config, "peft_type", None), object), PackedTuner):
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = load_peft_weights(path, device="cpu", **hub_options)
    require_trained(path, config, weights, partial(_stored_rows, base))
    recorded = config.base_quantization
    if recorded is None:
        warnings.warn(
            f"{path} does not record the base it was trained on: that it is this model was not checked.", stacklevel=3
        )
    elif given is not None and isinstance(model, PeftModel):
        model.base_model.require_base(adapter_name, recorded, config.base_model_name_or_path)
    elif given is not None:
        given.base_quantization = recorded


def _stored_rows(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """A tensor of a model without adapters, with as many rows as in the model's files, if these are known."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(module), attribute, None)
    except AttributeError:
        return None
    tensor = found if isinstance(found, torch.Tensor) else None
    source = Source.of(model, ())
    stored = None if source is None else source.checkpoint.tensors.get(name)
    return tensor if tensor is None or stored is None else tensor[: stored.shape[0]]


check_adapters(_check_saved)


ask_for_weight(is_prepared)


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
