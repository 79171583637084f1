"""Entry of this package's methods into PEFT. The only file that writes into another package.

PEFT has no plugin mechanism, so a method joins by becoming a real member of the `PeftType` enumeration (a bare string
fails in PEFT's card tagging and in transformers' adapter code) and by `register_peft_method`.
"""

from __future__ import annotations

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.peft_types import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Add a member to `PeftType`, or return the one of that name."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # Python 3.12 looks members up on the class
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 looks values up here
        PeftType._hashable_values_.append(name)
    return member


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Register a method with PEFT. Registering the same method again changes nothing.

    Raises:
        RuntimeError: the installed PEFT has a method of that name itself.
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
    """Let PEFT hot-swap adapters of a method with LoRA's tensors and options.

    Args:
        peft_type: the method's type.
        options: options of its own in which two adapters must agree, beside those of LoRA.
    """
    CONFIG_KEYS_TO_CHECK[peft_type] = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], *options]
