"""Proof that QFT trains: weights in int8 and in float move at the first step, and nothing that is frozen does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..first_step import TrainingError, require_unchanged, sample
from ..qft.weight import Int8Weight


_SURE = 20  # so many values that should move, at random, stay all where they are once in e ** 20 runs


class FirstStep:
    """State of a model right before a step.

    Args:
        model: the model.
        learning_rates: of the trained parameters, by `id`.
        stochastic: whether weights are rounded stochastically. Otherwise an update below half a step moves nothing,
            and is not expected to.
    """

    def __init__(self, model: nn.Module, learning_rates: Mapping[int, float], stochastic: bool) -> None:
        self.frozen: dict[str, tuple[torch.Tensor, int]] = {}
        self.before: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"int8": [], "float": []}
        self.expected = {"int8": 0.0, "float": 0.0}
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # rows without a gradient
        for name, parameter in model.named_parameters():
            stored = parameter.codes if isinstance(parameter, Int8Weight) else parameter
            if not parameter.requires_grad:
                self.frozen[name] = stored, stored._version
            elif id(parameter) in learning_rates and id(parameter) not in looked_up:
                kind = "int8" if isinstance(parameter, Int8Weight) else "float"
                before = sample(stored)
                self.before[kind].append((stored, before))
                moving = _moving(parameter, learning_rates[id(parameter)], stochastic)
                self.expected[kind] += moving * before.numel()

    def check(self) -> None:
        """Check the model right after the step.

        Raises:
            TrainingError: no int8 weight or no float parameter moved, although many should have; or a frozen one did.
        """
        require_unchanged(self.frozen, "Only parameters with `requires_grad` belong into the optimizer.")
        for kind, tensors in self.before.items():
            if self.expected[kind] < _SURE or any(not torch.equal(sample(now), before) for now, before in tensors):
                continue
            raise TrainingError(
                f"After the first optimizer step none of the {len(tensors)} trained {kind} tensors has moved, where "
                f"about {self.expected[kind]:.0f} of the values looked at should have. Check that gradients reach the "
                "weights and are not zero, as where every label is -100, which is ignored, or every sequence has one "
                "token."
            )


def _moving(parameter: torch.Tensor, learning_rate: float, stochastic: bool) -> float:
    """Share of a parameter's values that a step of Lion moves to another representable value."""
    if isinstance(parameter, Int8Weight):
        steps = learning_rate / parameter.scales[:, 0].abs().clamp(min=torch.finfo(torch.float32).tiny)
    else:
        values = sample(parameter).float().abs()
        steps = learning_rate / (values * torch.finfo(parameter.dtype).eps).clamp(min=torch.finfo(torch.float32).tiny)
    return float(steps.clamp(max=1).mean() if stochastic else (steps > 1).float().mean())
