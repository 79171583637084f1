"""One configuration object for adapters of several base models."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from typing import Any


class RecordedBase(dict[str, Any]):
    """The `base_quantization` of a configuration that was used on a model in memory.

    In a configuration loaded from a file it is a plain dict, and the adapter fits that base only. This one describes
    the base, and leaves the configuration free to be used on another.

    Attributes:
        base_name: `base_model_name_or_path` of the base.
        layers: names of the adapted layers.
        given_targets: `target_modules` as the user gave them.
        resolved_targets: `target_modules` as they were then written into the configuration.
    """

    base_name: str | None = None
    layers: frozenset[str] = frozenset()
    given_targets: Any = None
    resolved_targets: Any = None


def copy_without_record(given: Any) -> Any:
    """A copy of a configuration to use on a model: as the user gave it, without what was filled in for another base.

    `given` gets the name of the other base back, over which PEFT has written the model's.
    """
    config, record = copy(given), given.base_quantization
    if isinstance(record, RecordedBase):
        given.base_model_name_or_path = record.base_name
        config.base_quantization = None
        if config.target_modules == record.resolved_targets:
            config.target_modules = record.given_targets
    return config


def shared_config(given: Any, used: Any, given_targets: Any, layers: Collection[str]) -> Any:
    """The configuration that an adapter holds: the user's object, or the copy if that object describes another base.

    Args:
        given: the user's object.
        used: its copy, which was filled in.
        given_targets: `target_modules` of the copy before.
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
