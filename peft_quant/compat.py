"""What differs between versions of Python and of the packages beside this one."""

from __future__ import annotations

import warnings
from enum import EnumMeta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version


__version__ = "0.1.0"

PEFT_SUPPORTED = ("0.20.0", "0.22.0")
NEWEST_TESTED = {
    "accelerate": "1.15",
    "gptqmodel": "7.7",
    "optimum": "2.3",
    "torch": "2.14",
    "transformers": "5.24",
}
"""Of what is installed beside PEFT: newer patch releases count as tested."""


def require_supported_peft() -> None:
    """Raise an `ImportError` unless the installed PEFT is one this package was tested with."""
    installed = version("peft")
    oldest, too_new = PEFT_SUPPORTED
    if not Version(oldest) <= Version(installed) < Version(too_new):
        raise ImportError(
            f"peft_quant needs peft >= {oldest}, < {too_new}, found {installed}: "
            f'`pip install "peft>={oldest},<{too_new}"`.'
        )


def warn_of_untested_versions() -> None:
    """Warn of installed packages that are newer than those this package was tested with."""
    newer = []
    for package, newest in NEWEST_TESTED.items():
        try:
            installed = Version(version(package))
        except PackageNotFoundError:
            continue
        if installed.release[:2] > Version(newest).release:
            newer.append(f"{package} {installed} (tested up to {newest})")
    if newer:
        warnings.warn(
            f"peft_quant {__version__} was not tested with {', '.join(newer)}: if something fails, install the tested "
            "versions, or a newer peft_quant.",
            stacklevel=3,
        )


def peft_saves_biases() -> bool:
    """Whether PEFT saves the biases that an adapter trains, which it does since 0.21."""
    return Version(version("peft")).release >= (0, 21)


def validate_lora_state_dict(state_dict: dict[str, Any], adapter_name: str) -> None:
    """Warn of LoRA tensors that were saved in shards; PEFT has the check since 0.21."""
    from peft.utils.save_and_load import _validate_lora_adapter_state_dict

    _validate_lora_adapter_state_dict(state_dict, adapter_name=adapter_name)


def let_enum_find(enum: EnumMeta, member: Any) -> None:
    """Enter a member that was added to an enumeration where newer versions of Python look it up."""
    type.__setattr__(enum, member._name_, member)  # Python 3.12 looks names up on the class
    if hasattr(enum, "_hashable_values_"):  # Python 3.13 looks values up here
        enum._hashable_values_.append(member._value_)
