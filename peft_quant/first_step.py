"""First-step check: exactly the tensors that a method trains change at the first optimizer step.

An adapted model is checked once, at the first step that has a learning rate above zero and a gradient, by
`optimizer_steps.py`. int8 weights may be updated during backward, so their trainer takes an `Int8Snapshot` before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor


_STEPS_WITHOUT_GRADIENT = 10  # after so many steps, the data is at fault rather than a batch
_SURE = 20  # if so many values are expected to move at random, none does once in e ** 20 runs
_TINY = torch.finfo(torch.float32).tiny


class TrainingError(RuntimeError):
    """Training does not change what it should, or changes something else, or ten steps in a row were not finite."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(tensor: torch.Tensor, count: int = 1024) -> torch.Tensor:
    """View fewer than `2 * count` values, spread evenly over a tensor (or over this process's shard of it)."""
    flat = local(tensor.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // count)]


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what [`spread`] views."""
    return spread(tensor).clone()


class _Snapshot:
    """Tensors right before a step: versions of frozen ones, and samples of those that should move, by kind."""

    def __init__(self, *kinds: str) -> None:
        self.frozen: dict[str, tuple[torch.Tensor, int]] = {}
        self.trained: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {kind: [] for kind in kinds}

    def freeze(self, name: str, tensor: torch.Tensor) -> None:
        self.frozen[name] = tensor, tensor._version

    def require_frozen(self, way_out: str) -> None:
        changed = [name for name, (tensor, version) in self.frozen.items() if tensor._version != version]
        if changed:
            raise TrainingError(
                f"The optimizer changed {len(changed)} tensors that are frozen, first {changed[0]}. {way_out}"
            )

    def require_moved(self, kind: str, way_out: str) -> None:
        tensors = self.trained[kind]
        # this process's shards may all be empty
        has_values = any(before.numel() for _, before in tensors)
        if has_values and all(torch.equal(sample(tensor), before) for tensor, before in tensors):
            raise TrainingError(
                f"After the first optimizer step none of the {len(tensors)} {kind} tensors has moved{way_out}"
            )


class _AdapterSnapshot(_Snapshot):
    """An adapted model right before a step.

    Attributes:
        without_gradient: whether there are gradients and all are zero, as for a batch without labels.
    """

    def __init__(self, model: nn.Module, layer_class: type[BaseTunerLayer]) -> None:
        super().__init__("adapter")
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, layer_class)}
        moving = tuple(f"{name}.{attribute}." for name, layer in layers.items() for attribute in layer.first_to_move)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                self.freeze(name, parameter)
            elif name.startswith(moving):
                self.trained["adapter"].append((parameter, sample(parameter)))
        for name, layer in layers.items():
            for buffer_name, buffer in layer.get_base_layer().named_buffers():
                self.freeze(f"{name}.{buffer_name}", buffer)
        gradients = [tensor.grad for tensor, _ in self.trained["adapter"] if tensor.grad is not None]
        self.without_gradient = bool(gradients) and not any(gradient.any() for gradient in gradients)

    def check(self) -> None:
        self.require_frozen("Give it only the parameters with `requires_grad`, after `get_peft_model`.")
        if self.without_gradient:
            raise TrainingError(
                f"The gradients of all {len(self.trained['adapter'])} adapter tensors were zero in each of the first "
                f"{_STEPS_WITHOUT_GRADIENT} optimizer steps, as where every label is -100, which is ignored, every "
                "sequence has one token, or every weight is zero. Check the data set, its collator and the base."
            )
        self.require_moved(
            "adapter",
            ". Build the optimizer after `get_peft_model`, and check that gradients reach the adapter and are not "
            "zero.",
        )


class StepsWithoutGradient:
    """The steps before the first that can train something."""

    def __init__(self) -> None:
        self._count = 0

    def wait(self, without_gradient: bool) -> bool:
        """Whether to wait for the next step, which too many steps without gradient in all are no reason to."""
        self._count += without_gradient
        if without_gradient and self._count == 1:
            warnings.warn(
                "All gradients of an optimizer step were zero: every label of its batch is -100, which is ignored, or "
                "every sequence has one token.",
                stacklevel=3,
            )
        return without_gradient and self._count < _STEPS_WITHOUT_GRADIENT


class FirstStep:
    """Checks the first step that any optimizer takes on a model's adapters.

    Args:
        layer_class: class of the tuner layers; the adapter parameters in their `first_to_move` should move.
    """

    def __init__(self, layer_class: type[BaseTunerLayer]) -> None:
        self.layer_class = layer_class
        self._snapshot: _AdapterSnapshot | None = None
        self._without_gradient = StepsWithoutGradient()

    def before(self, model: nn.Module) -> None:
        """Remember the adapted model right before a step."""
        self._snapshot = _AdapterSnapshot(model, self.layer_class)

    def after(self) -> bool:
        """Check the model right after the step.

        Returns:
            Whether the step trained it. After one without gradients, or of another model, the next one is the first.

        Raises:
            TrainingError: no adapter parameter moved, or a frozen parameter or a buffer of a base layer did.
        """
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None or not snapshot.trained["adapter"]:
            return False
        if self._without_gradient.wait(snapshot.without_gradient):
            return False
        snapshot.check()
        return True


class Int8Snapshot(_Snapshot):
    """A model with int8 weights right before a step of Lion.

    Args:
        model: the model.
        learning_rates: learning rates of the trained parameters, by `id`.
        stochastic: whether weights are rounded stochastically. Otherwise updates below half a quantization step are
            not expected to move anything.
    """

    def __init__(self, model: nn.Module, learning_rates: Mapping[int, float], stochastic: bool) -> None:
        super().__init__("trained int8", "trained float")
        self.expected = dict.fromkeys(self.trained, 0.0)
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # some rows get no gradient
        for name, parameter in model.named_parameters():
            kind = "trained int8" if hasattr(parameter, "codes") else "trained float"
            stored = getattr(parameter, "codes", parameter)
            if not parameter.requires_grad:
                self.freeze(name, stored)
            elif id(parameter) in learning_rates and id(parameter) not in looked_up:
                before = sample(stored)
                self.trained[kind].append((stored, before))
                moving = _moving_share(parameter, learning_rates[id(parameter)], stochastic)
                self.expected[kind] += moving * before.numel()

    def check(self) -> None:
        """Check the model right after the step.

        Raises:
            TrainingError: no int8 weight or no float parameter moved, although many should have, or a frozen one did.
        """
        self.require_frozen("Only parameters with `requires_grad` belong into the optimizer.")
        for kind, expected in self.expected.items():
            if expected >= _SURE:
                self.require_moved(
                    kind,
                    f", where about {expected:.0f} of the values looked at should have. Check that gradients reach "
                    "the weights and are not zero, as where every label is -100, which is ignored, or every sequence "
                    "has one token.",
                )


def _moving_share(parameter: Any, learning_rate: float, stochastic: bool) -> float:
    """Share of a parameter's values that a step of Lion is expected to change after rounding."""
    if hasattr(parameter, "codes"):
        distance = parameter.scales[:, 0].abs()
    else:
        distance = sample(parameter).float().abs() * torch.finfo(parameter.dtype).eps
    steps = learning_rate / distance.clamp(min=_TINY)
    return float(steps.clamp(max=1).mean() if stochastic else (steps > 1).float().mean())
