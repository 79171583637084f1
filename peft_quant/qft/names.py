"""Mapping of checkpoint tensor names to model parameters and back, by transformers' own rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from ..gptq.names import conversions_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parameters_of(
    names: Iterable[str], model: PreTrainedModel, conversions: Iterable[WeightTransform]
) -> dict[str, tuple[list[str], str | None]]:
    """The parameters that `from_pretrained` creates from a checkpoint's tensors.

    Args:
        names: names of the tensors in the checkpoint.
        model: the model to load.
        conversions: the conversions it is loaded with.

    Returns:
        For each name, the parameters that the tensor becomes, whether or not the model has them, and the pattern of
        the conversion that computes them, or None.
    """
    conversions = deepcopy(list(conversions))  # using them changes their state
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    computing = {pattern: each for each in converters for pattern in each.source_patterns}
    expected: Any = model.state_dict()
    found = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        targets = [renamed]
        if pattern is not None:
            first, *_ = patterns = computing[pattern].target_patterns
            targets = [renamed.replace(first, each) for each in patterns]
        found[name] = targets, pattern
    return found


def conversions_to_revert(model: PreTrainedModel, int8: Iterable[str]) -> list[WeightTransform]:
    """The conversions that `save_pretrained` would revert if the model were in float.

    These are the ones that the model was loaded with and will be loaded with again, which excludes any passed to
    `from_pretrained`, and the ones that an int8 checkpoint does not need.

    Args:
        model: the model.
        int8: names of its int8 tensors.
    """
    loaded_with = getattr(model, "_weight_conversions", None)
    if loaded_with is None:
        conversions = conversions_of(model, add_legacy=False)
        return [each for each in conversions if not isinstance(each, PrefixChange)]
    conversions = conversions_of(model)
    apart = conversions_apart_from(int8, conversions)
    used = set(map(_effect, loaded_with))
    return [each for each in conversions if each not in apart or _effect(each) in used]


def conversions_apart_from(names: Iterable[str], conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """The conversions whose reversal computes nothing from the named tensors."""
    names = list(names)
    return [
        each
        for each in conversions
        if not (isinstance(each, WeightConverter) and any(map(_computes_from(each), names)))
    ]


def saved_as(names: Iterable[str], conversions: Iterable[WeightTransform]) -> dict[str, str]:
    """Checkpoint names by model name, for tensors from which reverting the conversions computes nothing."""
    reverse = [each.reverse_transform() for each in reversed(list(conversions)) if isinstance(each, WeightRenaming)]
    saved = {}
    for name in names:
        saved[name] = name
        for renaming in reverse:
            saved[name], _ = renaming.rename_source_key(saved[name])
    return saved


def _computes_from(converter: WeightConverter) -> Callable[[str], bool]:
    reverse = converter.reverse_transform()
    return lambda name: reverse.rename_source_key(name)[1] is not None


def _effect(conversion: WeightTransform) -> tuple[Any, ...]:
    return repr(conversion), conversion.scope_prefix, conversion.base_model_prefix
