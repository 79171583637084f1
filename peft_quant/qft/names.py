"""Which parameter of a model each tensor of a checkpoint is for, by transformers' own rules."""

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
    """What `from_pretrained` makes of a checkpoint's names.

    Args:
        names: of the tensors in the checkpoint.
        model: that is loaded.
        conversions: with which it is loaded.

    Returns:
        By name, the parameters that the tensor becomes, whether the model has them or not, and the pattern of the
        conversion that computes them, if one does.
    """
    conversions = deepcopy(list(conversions))  # they remember what they were used for
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    computing = {pattern: each for each in converters for pattern in each.source_patterns}
    own: Any = model.state_dict()
    found = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, own)
        targets = [renamed]
        if pattern is not None:
            first, *_ = patterns = computing[pattern].target_patterns
            targets = [renamed.replace(first, each) for each in patterns]
        found[name] = targets, pattern
    return found


def conversions_to_revert(model: PreTrainedModel, int8: Iterable[str]) -> list[WeightTransform]:
    """The conversions that `save_pretrained` would revert if the model were in float.

    They are those that it was loaded with and will be loaded with again, so none that were passed to
    `from_pretrained`, and those that an int8 checkpoint has no use for.

    Args:
        model: the model.
        int8: the names of its tensors in int8.
    """
    loaded_with = getattr(model, "_weight_conversions", None)
    if loaded_with is None:
        conversions = conversions_of(model, add_legacy=False)
        return [each for each in conversions if not isinstance(each, PrefixChange)]
    conversions = conversions_of(model)
    apart = conversions_apart_from(int8, conversions)
    used = set(map(_what_it_does, loaded_with))
    return [each for each in conversions if each not in apart or _what_it_does(each) in used]


def conversions_apart_from(names: Iterable[str], conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """Those conversions that, reverted, compute nothing from the tensors of these names."""
    names = list(names)
    return [
        each
        for each in conversions
        if not (isinstance(each, WeightConverter) and any(map(_computes_from(each), names)))
    ]


def saved_as(names: Iterable[str], conversions: Iterable[WeightTransform]) -> dict[str, str]:
    """What tensors, from which reverting the conversions computes nothing, are called in a checkpoint; by name."""
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


def _what_it_does(conversion: WeightTransform) -> tuple[Any, ...]:
    return repr(conversion), conversion.scope_prefix, conversion.base_model_prefix
