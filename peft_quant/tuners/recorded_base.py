"""Reuse of one configuration object for adapters of several base models."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from typing import Any


class RecordedBase(dict[str, Any]):
    """The `base_quantization` of a configuration that was used on a model in memory.

    In a configuration loaded from a file it is a plain dict, and the adapter fits only that base. This class marks the
    entry as recomputable, so that the configuration can be used on another base.

    Attributes:
        base_name: `base_model_name_or_path` of the base.
        layers: names of the adapted layers.
        given_targets: `target_modules` as the user gave them.
        resolved_targets: `target_modules` as the library resolved them for this base.
    """

    base_name: str | None = None
    layers: frozenset[str] = frozenset()
    given_targets: Any = None
    resolved_targets: Any = None


def copy_without_record(given: Any) -> Any:
    """A copy of a configuration as the user gave it, without the fields filled in for another base.

    In `given` itself, the name of the other base is restored, which PEFT has overwritten with the model's.
    """
    config, record = copy(given), given.base_quantization
    if isinstance(record, RecordedBase):
        given.base_model_name_or_path = record.base_name
        config.base_quantization = None
        if config.target_modules == record.resolved_targets:
            config.target_modules = record.given_targets
    return config


def shared_config(given: Any, used: Any, given_targets: Any, layers: Collection[str]) -> Any:
    """The configuration that an adapter keeps: the user's object, or its copy if that object describes another base.

    Args:
        given: the user's object.
        used: its copy, with the fields filled in.
        given_targets: `target_modules` of the copy before they were filled in.
        layers: names of the adapted layers.
    """
    earlier, record = given.base_quantization, used.base_quantization
    if isinstance(record, RecordedBase):
        record.base_name, record.layers = used.base_model_name_or_path, frozenset(layers)
        record.given_targets, record.resolved_targets = given_targets, used.target_modules
    if isinstance(earlier, RecordedBase):
        same = {**vars(given), "target_modules": None} == {**vars(used), "target_modules": None}
        if not same or earlier.layers != record.layers:
            return used
    vars(given).update(vars(used))
    return given
