"""Everything this package changes in PEFT, transformers and optimum. No other file modifies another package.

PEFT has no plugin mechanism, so a method is added as a real member of the `PeftType` enumeration (a bare string fails
in PEFT's card tagging and in transformers' adapter code) and with `register_peft_method`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig, PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from .compat import let_enum_find


_WRAPPERS = "_peft_quant_wrappers"


def add_peft_type(name: str) -> PeftType:
    """Add a member to `PeftType`, or return the existing one of that name."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    let_enum_find(PeftType, member)
    return member


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Register a method with PEFT. Registering the same method again changes nothing.

    Raises:
        RuntimeError: the installed PEFT has its own method of that name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
    if registered is config_class:
        return
    if registered is not None:
        raise RuntimeError(
            f"PEFT has a method named {name.upper()} already ({registered.__module__}). Use PEFT's own, or install a "
            "release of peft_quant made for this version of PEFT."
        )
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)


def allow_hotswap(peft_type: PeftType, options: list[str]) -> None:
    """Let PEFT hot-swap adapters of a method that has LoRA's tensors and options.

    Args:
        peft_type: the method's type.
        options: the method's own options that two adapters must share, in addition to LoRA's.
    """
    CONFIG_KEYS_TO_CHECK[peft_type] = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], *options]


def register_quantization(method: str, config_class: type[Any], quantizer_class: type[HfQuantizer]) -> None:
    """Register a quantization method with transformers. Registering the same one again changes nothing.

    Args:
        method: its `quant_method`.
        config_class: class of its quantization configs.
        quantizer_class: class that loads and saves its checkpoints.

    Raises:
        RuntimeError: the installed transformers has its own quantization method of that name.
    """
    registered = AUTO_QUANTIZER_MAPPING.get(method)
    if registered is quantizer_class:
        return
    if registered is not None:
        raise RuntimeError(
            f"transformers has a quantization named {method} already ({registered.__module__}). Install a release of "
            "peft_quant made for this version of transformers."
        )
    register_quantization_config(method)(config_class)
    register_quantizer(method)(quantizer_class)


def replace_quantizer(method: str, quantizer_class: type[HfQuantizer]) -> None:
    """Let transformers load the checkpoints of a quantization method with a class derived from its own. Idempotent.

    If another package has already replaced the quantizer, nothing changes.

    Args:
        method: the `quant_method` of the checkpoints.
        quantizer_class: derived from transformers' own quantizer.
    """
    if issubclass(quantizer_class, AUTO_QUANTIZER_MAPPING[method]):
        AUTO_QUANTIZER_MAPPING[method] = quantizer_class


@contextmanager
def replace_gptq_solver(solver_class: type[Any]) -> Iterator[None]:
    """Context in which optimum's `GPTQQuantizer` quantizes each layer with the given class.

    Args:
        solver_class: derived from `optimum.gptq.quantizer.GPTQ`.
    """
    from optimum.gptq import quantizer

    stock = quantizer.GPTQ
    quantizer.GPTQ = solver_class
    try:
        yield
    finally:
        quantizer.GPTQ = stock


def wrap_method(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Wrap a method of a class of PEFT or transformers, or a function of a module. Idempotent.

    Args:
        owner: the class or module; parents from which a class inherits the method are not changed.
        name: name of the method.
        method: the wrapper, called as `method(stock, self, ...)`, where `stock` is the original method or an earlier
            wrapper of it.
    """
    stock = getattr(owner, name)
    wrappers, wrapper = getattr(stock, _WRAPPERS, ()), f"{method.__module__}.{method.__qualname__}"
    if wrapper in wrappers:
        return

    @wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return method(stock, *args, **kwargs)

    setattr(wrapped, _WRAPPERS, (*wrappers, wrapper))
    setattr(owner, name, wrapped)


AdapterCheck = Callable[[PreTrainedModel | PeftModel, str, str, PeftConfig | None, dict[str, Any]], None]


def check_adapters(check: AdapterCheck) -> None:
    """Check each saved adapter before PEFT or transformers loads its weights. Idempotent.

    Args:
        check: called as `check(model, path, adapter_name, config, hub_options)`: directory or Hub id of the adapter,
            the configuration that replaces its own (or None), and Hub options.
    """

    def load_into_peft_model(
        stock: Any, model: PeftModel, /, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        hub_options = model._split_kwargs(kwargs)[0]
        check(model, os.fspath(model_id), adapter_name, model.peft_config.get(adapter_name), hub_options)
        return stock(model, model_id, adapter_name, *args, **kwargs)

    def load_into_model(stock: Any, model: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = signature(stock).bind(model, *args, **kwargs).arguments
        path = given.get("peft_model_id") or getattr(given.get("load_config"), "pretrained_model_name_or_path", None)
        if path is not None and given.get("adapter_state_dict") is None:
            name = given.get("adapter_name") or "default"
            check(model, os.fspath(path), name, given.get("peft_config"), dict(given.get("adapter_kwargs") or {}))
        return stock(model, *args, **kwargs)

    wrap_method(PeftModel, "load_adapter", load_into_peft_model)
    wrap_method(PreTrainedModel, "load_adapter", load_into_model)


def read_adapter_configs(read: Callable[[Callable[[str], Any], type[PeftConfig], str], Any]) -> None:
    """Let PEFT read each `adapter_config.json` through a function. Idempotent.

    Args:
        read: called as `read(stock, config_class, file)`, where `stock(file)` returns the content as PEFT reads it.
    """
    stock = PeftConfigMixin.from_json_file
    if hasattr(stock, _WRAPPERS):
        return

    @wraps(stock)
    def from_json_file(cls: type[PeftConfig], path_json_file: str, **kwargs: Any) -> Any:
        return read(stock, cls, path_json_file)

    setattr(from_json_file, _WRAPPERS, (read.__qualname__,))
    PeftConfigMixin.from_json_file = classmethod(from_json_file)


def ask_for_weight(knows: Callable[[nn.Module], bool]) -> None:
    """Let adapter layers of any method return their base layer's `weight`, where PEFT returns its packed integers.

    Models such as T5 cast activations to the dtype of `weight`. Calling it again changes nothing.

    Args:
        knows: whether a base layer has a `weight` to use (a GPTQ layer that defines one).
    """
    stock = BaseTunerLayer.weight.fget
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def weight(self: BaseTunerLayer) -> Any:
        layer = self.get_base_layer()
        return layer.weight if knows(layer) else stock(self)

    BaseTunerLayer.weight = property(weight)
