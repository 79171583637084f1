"""The files of an adapter, which strangers write: types and sizes, checked before PEFT or inspection uses them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .module_names import split_adapter_key
from .reading import InvalidFileError


_METHODS = ("PEQA", "LREC")
_MOST_NAMES = 50_000  # the layers of the largest mixtures
_MOST_PATTERNS = 1_000

_Check = tuple[str, Callable[[Any], bool]]
"""A type in words, and whether a value has it."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list(value: Any, of: Callable[[Any], bool], most: float = _MOST_PATTERNS) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(of, value))


def _is_mapping(value: Any, to: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and len(value) <= _MOST_PATTERNS and all(map(to, value.values()))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_indices(value: Any) -> bool:
    return _is_list(value, _is_integer, math.inf)


def _texts(most: int) -> _Check:
    return (
        f"a text or a list of at most {most} texts",
        lambda value: _is_text(value) or _is_list(value, _is_text, most),
    )


_TEXT: _Check = ("a text", _is_text)
_FLAG: _Check = ("true or false", _is_flag)
_NUMBER: _Check = ("a finite number", _is_number)
_CHECKS: Mapping[str, _Check] = {
    "alpha_pattern": (f"a mapping of at most {_MOST_PATTERNS} numbers", lambda value: _is_mapping(value, _is_number)),
    "auto_mapping": ("a mapping", lambda value: _is_mapping(value, _is_scalar)),
    "base_fingerprint": _TEXT,
    "base_model_name_or_path": _TEXT,
    "base_quantization": (
        "a mapping of single values or short lists",
        lambda value: _is_mapping(value, lambda each: _is_scalar(each) or _is_list(each, _is_scalar)),
    ),
    "bias": _TEXT,
    "ensure_weight_tying": _FLAG,
    "exclude_modules": _texts(_MOST_NAMES),
    "inference_mode": _FLAG,
    "init_lora_weights": ("true, false or a text", lambda value: _is_flag(value) or _is_text(value)),
    "init_lrec_weights": _TEXT,
    "init_weights": _FLAG,
    "layers_pattern": _texts(_MOST_PATTERNS),
    "layers_to_transform": (
        f"an integer or a list of at most {_MOST_PATTERNS} integers",
        lambda value: _is_integer(value) or _is_list(value, _is_integer),
    ),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "modules_to_save": (f"a list of at most {_MOST_PATTERNS} texts", lambda value: _is_list(value, _is_text)),
    "peft_quant_version": _TEXT,
    "peft_type": _TEXT,
    "peft_version": _TEXT,
    "r": ("an integer", _is_integer),
    "rank_pattern": (f"a mapping of at most {_MOST_PATTERNS} integers", lambda value: _is_mapping(value, _is_integer)),
    "revision": _TEXT,
    "save_as_lora": _FLAG,
    "serving_dtype": _TEXT,
    "target_modules": _texts(_MOST_NAMES),
    "task_type": _TEXT,
    "trainable_token_indices": (
        "a list of integers or a mapping to such lists",
        lambda value: _is_indices(value) or _is_mapping(value, _is_indices),
    ),
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
}
_OTHER: _Check = (
    f"a single value or has at most {_MOST_PATTERNS} entries",
    lambda value: not isinstance(value, (dict, list)) or len(value) <= _MOST_PATTERNS,
)
_NOT_NULL = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern")


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether the content of an `adapter_config.json` is of an adapter of PEQA or LREC, even if it is damaged."""
    return content.get("peft_type") in _METHODS or "base_quantization" in content or "peft_quant_version" in content


def check_adapter_config(file: str | os.PathLike[str], content: Mapping[str, Any], *, ours: bool) -> None:
    """Check the types and sizes of the options of an adapter of PEQA, LREC or LoRA.

    Of options that are not known here, only the size is checked.

    Args:
        file: the `adapter_config.json`.
        content: its content.
        ours: whether it has to be an adapter of PEQA or LREC.

    Raises:
        InvalidFileError: naming the file, the option and its value.
    """
    for name in {**_CHECKS, **content}:
        kind, is_valid = _CHECKS.get(name, _OTHER)
        value = content.get(name)
        if value is None and (name not in _NOT_NULL or name not in content):
            continue
        if not is_valid(value):
            raise InvalidFileError(_changed(file, f"{name}={value!r:.200}, which is not {kind}"))
    if ours and content.get("peft_type") not in _METHODS:
        raise InvalidFileError(_changed(file, f"peft_type={content.get('peft_type')!r}, which is not PEQA or LREC"))


def check_adapter_dtypes(file: str | os.PathLike[str], dtypes: Mapping[str, torch.dtype | None]) -> None:
    """Check the dtypes of an adapter's tensors: floating point of 16 bits or more, except in whole modules.

    Args:
        file: its `adapter_model.safetensors`.
        dtypes: dtypes by name, None for one that PyTorch does not have.

    Raises:
        InvalidFileError: naming the file and the tensor.
    """
    for name, dtype in dtypes.items():
        of_module = not split_adapter_key(name)[1]
        if dtype is None or not (dtype.itemsize > 1 if dtype.is_floating_point else of_module):
            raise InvalidFileError(_changed(file, f"{name} as {dtype or 'an unknown dtype'}, which does not train"))


def _changed(file: str | os.PathLike[str], found: str) -> str:
    return f"{file} has {found}: it is damaged or was changed. Save or download the adapter again."
