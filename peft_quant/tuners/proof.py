"""Proof that training trains: what a method claims to train moves at the first optimizer step, and nothing else does.

PyTorch calls a pair of hooks around every `Optimizer.step`. A model under proof is looked at around the first step
that has a learning rate above zero, involves any of its parameters and has a gradient, and let go.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..first_step import TrainingError, require_unchanged, sample


_STEPS_WITHOUT_GRADIENT = 10  # after so many, it is not a batch but the data


class _Snapshot:
    """State of a model right before a step: samples of the adapter tensors to move, versions of all frozen ones.

    Attributes:
        without_gradient: whether there are gradients and all are zero, as of a batch without labels.
    """

    def __init__(self, model: nn.Module, layer_class: type[BaseTunerLayer]) -> None:
        names = [
            f"{name}.{attribute}."
            for name, layer in model.named_modules()
            if isinstance(layer, layer_class)
            for attribute in layer.first_to_move
        ]
        self.trained: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.frozen: dict[str, tuple[torch.Tensor, int]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                self.frozen[name] = parameter, parameter._version
            elif name.startswith(tuple(names)):
                self.trained[name] = parameter, sample(parameter)
        for name, layer in model.named_modules():
            if isinstance(layer, layer_class):
                for buffer_name, buffer in layer.get_base_layer().named_buffers():
                    self.frozen[f"{name}.{buffer_name}"] = buffer, buffer._version

        gradients = [tensor.grad for tensor, _ in self.trained.values() if tensor.grad is not None]
        self.without_gradient = bool(gradients) and not any(gradient.any() for gradient in gradients)

    def check(self) -> None:
        require_unchanged(self.frozen, "Give it only the parameters with `requires_grad`, after `get_peft_model`.")
        moved = [name for name, (tensor, before) in self.trained.items() if not torch.equal(sample(tensor), before)]
        if self.without_gradient:
            raise TrainingError(
                f"The gradients of all {len(self.trained)} adapter tensors were zero in each of the first "
                f"{_STEPS_WITHOUT_GRADIENT} optimizer steps, as where every label is -100, which is ignored, or every "
                "sequence has one token. Check the data set and its collator."
            )
        # a process may hold no row of any sharded tensor
        if not moved and any(before.numel() for _, before in self.trained.values()):
            raise TrainingError(
                f"After the first optimizer step none of the {len(self.trained)} adapter tensors has moved. Build the "
                "optimizer after `get_peft_model`, and check that gradients reach the adapter and are not zero."
            )


class _Proof:
    def __init__(self, layer_class: type[BaseTunerLayer]) -> None:
        self.layer_class = layer_class
        self.snapshot: _Snapshot | None = None
        self.without_gradient = 0


_under_proof: weakref.WeakKeyDictionary[nn.Module, _Proof] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # never removed: PyTorch iterates over the hooks of all models while it calls them


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    overflow = getattr(optimizer, "found_inf", None)  # set by a GradScaler, whose fused step then does nothing
    if overflow:
        return
    for model, proof in list(_under_proof.items()):
        if _involves(optimizer, model):
            proof.snapshot = _Snapshot(model, proof.layer_class)


def _after_step(*_: Any) -> None:
    for model, proof in list(_under_proof.items()):
        snapshot, proof.snapshot = proof.snapshot, None
        if snapshot is None or not snapshot.trained:
            continue
        proof.without_gradient += snapshot.without_gradient
        if snapshot.without_gradient and proof.without_gradient < _STEPS_WITHOUT_GRADIENT:
            if proof.without_gradient == 1:
                warnings.warn(
                    "All gradients of an optimizer step were zero: every label of its batch is -100, which is "
                    "ignored, or every sequence has one token.",
                    stacklevel=2,
                )
            continue
        del _under_proof[model]
        snapshot.check()


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


def _involves(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer holds a parameter of the model in a group whose learning rate is above zero."""
    updated = {id(p) for group in optimizer.param_groups if float(group.get("lr", 1)) > 0 for p in group["params"]}
    return any(id(parameter) in updated for parameter in model.parameters())
