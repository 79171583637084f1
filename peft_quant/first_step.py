"""Proof that training trains: what a method claims to train moves at the first optimizer step, and nothing else does.

For adapters, PyTorch calls a pair of hooks around every `Optimizer.step`. A model under proof is looked at around the
first step that has a learning rate above zero, involves any of its parameters and has a gradient, and let go. Weights
in int8 may be updated within backward already: their trainer calls `Int8FirstStep` around all of it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


_SAMPLES = 1024
_STEPS_WITHOUT_GRADIENT = 10  # after so many, it is not a batch but the data
_SURE = 20  # so many values that should move, at random, stay all where they are once in e ** 20 runs
_TINY = torch.finfo(torch.float32).tiny


class TrainingError(RuntimeError):
    """Training that does not train what its method claims to train, or that trains something else."""


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of at most some thousand values, spread evenly over a tensor; of a sharded one, over the own shard."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


class _Frozen:
    """Tensors that no step may write to, with their versions."""

    def __init__(self) -> None:
        self._versions: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._versions[name] = tensor, tensor._version

    def check(self, way_out: str) -> None:
        changed = [name for name, (tensor, version) in self._versions.items() if tensor._version != version]
        if changed:
            raise TrainingError(
                f"The optimizer changed {len(changed)} tensors that are frozen, first {changed[0]}. {way_out}"
            )


class _Trained:
    """Tensors that a step should move, with samples from before it."""

    def __init__(self) -> None:
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> int:
        """How many values of it are compared."""
        self._before.append((tensor, sample(tensor)))
        return self._before[-1][1].numel()

    def stayed(self) -> bool:
        """Whether values are compared and none moved; a process may hold no row of any sharded tensor."""
        has_values = any(before.numel() for _, before in self._before)
        return has_values and all(torch.equal(sample(tensor), before) for tensor, before in self._before)

    def without_gradient(self) -> bool:
        """Whether there are gradients and all are zero, as of a batch without labels."""
        gradients = [tensor.grad for tensor, _ in self._before if tensor.grad is not None]
        return bool(gradients) and not any(gradient.any() for gradient in gradients)

    def __len__(self) -> int:
        return len(self._before)


class _AdapterStep:
    """An adapted model right before a step."""

    def __init__(self, model: nn.Module, layer_class: type[BaseTunerLayer]) -> None:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, layer_class)}
        moving = tuple(f"{name}.{attribute}." for name, layer in layers.items() for attribute in layer.first_to_move)
        self.trained, self.frozen = _Trained(), _Frozen()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                self.frozen.add(name, parameter)
            elif name.startswith(moving):
                self.trained.add(parameter)
        for name, layer in layers.items():
            for buffer_name, buffer in layer.get_base_layer().named_buffers():
                self.frozen.add(f"{name}.{buffer_name}", buffer)
        self.without_gradient = self.trained.without_gradient()

    def check(self) -> None:
        self.frozen.check("Give it only the parameters with `requires_grad`, after `get_peft_model`.")
        if self.without_gradient:
            raise TrainingError(
                f"The gradients of all {len(self.trained)} adapter tensors were zero in each of the first "
                f"{_STEPS_WITHOUT_GRADIENT} optimizer steps, as where every label is -100, which is ignored, or every "
                "sequence has one token. Check the data set and its collator."
            )
        if self.trained.stayed():
            raise TrainingError(
                f"After the first optimizer step none of the {len(self.trained)} adapter tensors has moved. Build the "
                "optimizer after `get_peft_model`, and check that gradients reach the adapter and are not zero."
            )


class _Proof:
    def __init__(self, layer_class: type[BaseTunerLayer]) -> None:
        self.layer_class = layer_class
        self.step: _AdapterStep | None = None
        self.without_gradient = 0


_under_proof: weakref.WeakKeyDictionary[nn.Module, _Proof] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # never removed: PyTorch iterates over the hooks of all models while it calls them


def prove_first_step(model: nn.Module, layer_class: type[BaseTunerLayer]) -> None:
    """Check the first optimizer step that is taken on a model's adapters, of whichever optimizer. Idempotent.

    Args:
        model: the model whose tuner layers are of `layer_class`.
        layer_class: the tuner layers; the adapter parameters in their `first_to_move` are what should move.

    Raises (from `Optimizer.step`):
        TrainingError: no adapter parameter moved, or a frozen parameter or a buffer of a base layer did.
    """
    if model not in _under_proof:
        _under_proof[model] = _Proof(layer_class)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    overflow = getattr(optimizer, "found_inf", None)  # set by a GradScaler, whose fused step then does nothing
    if overflow:
        return
    for model, proof in list(_under_proof.items()):
        if _involves(optimizer, model):
            proof.step = _AdapterStep(model, proof.layer_class)


def _after_step(*_: Any) -> None:
    for model, proof in list(_under_proof.items()):
        step, proof.step = proof.step, None
        if step is None or not len(step.trained):
            continue
        proof.without_gradient += step.without_gradient
        if step.without_gradient and proof.without_gradient < _STEPS_WITHOUT_GRADIENT:
            if proof.without_gradient == 1:
                warnings.warn(
                    "All gradients of an optimizer step were zero: every label of its batch is -100, which is "
                    "ignored, or every sequence has one token.",
                    stacklevel=2,
                )
            continue
        del _under_proof[model]
        step.check()


def _involves(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer holds a parameter of the model in a group whose learning rate is above zero."""
    updated = {id(p) for group in optimizer.param_groups if float(group.get("lr", 1)) > 0 for p in group["params"]}
    return any(id(parameter) in updated for parameter in model.parameters())


class Int8FirstStep:
    """A model with int8 weights right before a step of Lion.

    Args:
        model: the model.
        learning_rates: of the trained parameters, by `id`.
        stochastic: whether weights are rounded stochastically. Otherwise an update below half a step moves nothing,
            and is not expected to.
    """

    def __init__(self, model: nn.Module, learning_rates: Mapping[int, float], stochastic: bool) -> None:
        self.frozen = _Frozen()
        self.trained = {"int8": _Trained(), "float": _Trained()}
        self.expected = {"int8": 0.0, "float": 0.0}
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # rows without a gradient
        for name, parameter in model.named_parameters():
            codes = getattr(parameter, "codes", None)
            stored = parameter if codes is None else codes
            if not parameter.requires_grad:
                self.frozen.add(name, stored)
            elif id(parameter) in learning_rates and id(parameter) not in looked_up:
                kind = "float" if codes is None else "int8"
                moving = _moving_share(parameter, learning_rates[id(parameter)], stochastic)
                self.expected[kind] += moving * self.trained[kind].add(stored)

    def check(self) -> None:
        """Check the model right after the step.

        Raises:
            TrainingError: no int8 weight or no float parameter moved, although many should have; or a frozen one did.
        """
        self.frozen.check("Only parameters with `requires_grad` belong into the optimizer.")
        for kind, trained in self.trained.items():
            if self.expected[kind] >= _SURE and trained.stayed():
                raise TrainingError(
                    f"After the first optimizer step none of the {len(trained)} trained {kind} tensors has moved, "
                    f"where about {self.expected[kind]:.0f} of the values looked at should have. Check that gradients "
                    "reach the weights and are not zero, as where every label is -100, which is ignored, or every "
                    "sequence has one token."
                )


def _moving_share(parameter: Any, learning_rate: float, stochastic: bool) -> float:
    """Share of a parameter's values that a step of Lion moves to another representable value."""
    if hasattr(parameter, "codes"):
        distance = parameter.scales[:, 0].abs()
    else:
        distance = sample(parameter).float().abs() * torch.finfo(parameter.dtype).eps
    steps = learning_rate / distance.clamp(min=_TINY)
    return float(steps.clamp(max=1).mean() if stochastic else (steps > 1).float().mean())
