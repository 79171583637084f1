"""The policy: which parameters of a model are int8, and which stay in float."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..gptq import is_packed
from .config import QFTConfig


class _Layer(NamedTuple):
    """A module, and the facts about it that the policy depends on."""

    name: str
    module: nn.Module
    head: bool
    tied: bool


class Rule(NamedTuple):
    """A row of the policy; the first that applies to a module decides.

    Attributes:
        role: name of such modules in reports.
        applies: whether the rule covers a module.
        int8: whether the `weight` of such modules is int8.
    """

    role: str
    applies: Callable[[_Layer], bool]
    int8: Callable[[QFTConfig, _Layer], bool]


_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs)$")
_ROUTER = re.compile(r"(^|\.)(gate|router|wg|shared_expert_gate|router\.[^.]+)$")

POLICY = (
    # everything that a class adds to its base model, so that the base is the same under every head; a head tied to the
    # embeddings shares their tensor
    Rule(
        "head",
        lambda layer: layer.head or bool(_HEAD.search(layer.name)),
        lambda config, layer: layer.tied and config.embeddings,
    ),
    # small, and sensitive: it chooses the experts
    Rule("router", lambda layer: bool(_ROUTER.search(layer.name)), lambda config, layer: False),
    Rule(
        "linear layer",
        lambda layer: isinstance(layer.module, (nn.Linear, Conv1D)) or is_packed(layer.module),
        lambda config, layer: True,
    ),
    Rule("embedding", lambda layer: isinstance(layer.module, nn.Embedding), lambda config, layer: config.embeddings),
)
"""Everything else (norms, biases, experts in one tensor) stays in float."""


def int8_modules(model: nn.Module, config: QFTConfig) -> dict[str, nn.Module]:
    """The modules whose `weight` is int8 under a config, by name.

    Raises:
        ValueError: none of them is a linear layer.
    """
    found, linear = {}, 0
    skipped = config.modules_to_not_convert or []
    base = f"{getattr(model, 'base_model_prefix', '')}."
    for layer in _layers(model):
        rule = next((rule for rule in POLICY if rule.applies(layer)), None)
        named = any(_is_named(layer.name, entry, base) for entry in skipped)
        if rule is None or not rule.int8(config, layer) or named:
            continue
        found[layer.name] = layer.module
        linear += rule.role == "linear layer"
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to hold in int8"
            + (f" beside modules_to_not_convert={skipped}" if skipped else "")
            + ": QFT quantizes the `weight` of nn.Linear, Conv1D and GPTQ layers."
        )
    return found


def _layers(model: nn.Module) -> list[_Layer]:
    head, embedding = (_embeddings(model, which) for which in ("output", "input"))
    added = _added_to_base(model)
    layers = []
    for name, module in model.named_modules():
        tied = module is head and (
            getattr(head, "weight", None) is getattr(embedding, "weight", ...)
            or f"{name}.weight" in getattr(model, "all_tied_weights_keys", {})
        )
        layers.append(_Layer(name, module, module is head or module in added, tied))
    return layers


def _embeddings(model: Any, which: str) -> nn.Module | None:
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):  # not a transformers model, or not a text model
        return None


def _added_to_base(model: nn.Module) -> set[nn.Module]:
    """Modules outside the model's base model and any other model inside it."""
    base = getattr(model, "base_model", model)
    if base is model or not isinstance(base, nn.Module):
        return set()
    inner = [base, *(each for each in model.modules() if isinstance(each, PreTrainedModel) and each is not model)]
    return set(model.modules()) - {module for each in inner for module in each.modules()}


def _is_named(name: str, entry: str, base: str) -> bool:
    """Whether an entry names a module, with or without the prefix of the base model."""
    pairs = ((name, entry), (name.removeprefix(base), entry.removeprefix(base)))
    return any(full == given or full.endswith(f".{given}") or full.startswith(f"{given}.") for full, given in pairs)
