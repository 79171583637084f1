"""Every optimizer step on adapters: skipped if a gradient is not finite, and checked if it is the first.

PyTorch calls a pair of hooks around every `Optimizer.step`, whoever calls it. They act on optimizers that hold
parameters of a model with adapters of this package. A step is skipped by dropping its gradients, without which no
optimizer changes a parameter or its state. A `GradScaler` skips steps itself, before the hooks.
"""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .first_step import FirstStep, TrainingError, local


logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""So many steps skipped in a row end training."""

_CAUSES = (
    "Usual causes: a learning rate that is too high, NaN in a batch, a mean over a batch without labels (0/0), or "
    "activations beyond 65504, the largest number in fp16 (train in bf16)."
)


class SkippedSteps:
    """The steps of one optimizer that were skipped because gradients were not finite.

    Attributes:
        steps: number of steps, skipped ones included.
        total: number of skipped ones.
        in_a_row: number of skipped ones since the last that was not.
    """

    def __init__(self) -> None:
        self.steps = self.total = self.in_a_row = 0

    def count(self, skipped: bool) -> None:
        """Count a step, and log it if it was skipped and their number has doubled.

        Raises:
            TrainingError: `MAX_SKIPPED_STEPS` in a row were skipped.
        """
        self.steps += 1
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"The gradients of the last {self.in_a_row} optimizer steps, up to step {self.steps} of this run, "
                "were not finite, so they were skipped: what trains is as it was before them, and can be saved. "
                + _CAUSES
            )
        if skipped and self.total.bit_count() == 1:
            logger.warning(
                "The gradients of optimizer step %d of this run were not finite, so it was skipped; %d so far. %d in "
                "a row end training. %s",
                self.steps,
                self.total,
                MAX_SKIPPED_STEPS,
                _CAUSES,
            )


class StepMonitor(Protocol):
    """Looks at a model's adapters between optimizer steps."""

    def suspects(self) -> torch.Tensor | None:
        """A number on the device, cheap to compute at every step, or None if there is nothing to look at."""

    def report(self, suspects: float) -> None:
        """Look closer if that number, now on the CPU, is a reason to."""


@dataclass
class _Watched:
    """A model under watch."""

    layer_class: type[BaseTunerLayer]
    monitor: StepMonitor | None
    first: FirstStep | None = None
    skipped: int = 0


@dataclass
class _Optimizer:
    """What is known of an optimizer.

    Attributes:
        skipped: its skipped steps.
        models: the models under watch that it holds parameters of, and whether the first one that trains is among
            these; None if they are to be looked up.
        size: number of parameters when they were.
    """

    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    models: list[tuple[weakref.ref[nn.Module], bool]] | None = None
    size: int = 0


_watched: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()
_optimizers: weakref.WeakKeyDictionary[Optimizer, _Optimizer] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # never removed, because PyTorch iterates over the hooks while calling them


def watch_steps(model: nn.Module, layer_class: type[BaseTunerLayer], monitor: StepMonitor | None = None) -> None:
    """Watch all optimizer steps on a model's adapters. Call it again when another adapter was added.

    Args:
        model: the model, with tuner layers of `layer_class`.
        layer_class: class of the tuner layers, see [`FirstStep`].
        monitor: looks at the adapters between steps.

    Raises (from `Optimizer.step`):
        TrainingError: the first step did not train what it should, or too many in a row were skipped.
    """
    watched = _watched.setdefault(model, _Watched(layer_class, monitor))
    watched.monitor = monitor or watched.monitor
    watched.first = watched.first or FirstStep(layer_class)
    for optimizer in _optimizers.values():
        optimizer.models = None
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def skipped_steps(model: nn.Module) -> int:
    """Number of optimizer steps that were skipped because a gradient of a model's adapters was not finite."""
    return sum(
        watched.skipped
        for inner, watched in list(_watched.items())
        if any(module is inner for module in model.modules())
    )


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    models = _models_of(optimizer, parameters)
    if not models or _is_captured(parameters):
        return
    if getattr(optimizer, "found_inf", None):  # set by a GradScaler; a fused step then does nothing
        return
    watched = [_watched[model] for model in models]
    # one optimizer is enough where every parameter has its own
    monitors = [w.monitor for w, has_first in zip(watched, models.values()) if w.monitor is not None and has_first]
    bad, *suspects = _read([_not_finite(parameters), *(monitor.suspects() for monitor in monitors)])
    for monitor, found in zip(monitors, suspects):
        monitor.report(found)
    if bad:
        for parameter in parameters:
            parameter.grad = None
        for w in watched:
            w.skipped += 1
    _optimizers[optimizer].skipped.count(bool(bad))
    if not bad:
        for model, w in zip(models, watched):
            if w.first is not None and _updates(optimizer, model):
                w.first.before(model)


def _after_step(*_: Any) -> None:
    for watched in list(_watched.values()):
        if watched.first is not None and watched.first.after():
            watched.first = None
            if watched.monitor is not None:
                watched.monitor.report(*_read([watched.monitor.suspects()]))


def _models_of(optimizer: Optimizer, parameters: list[torch.Tensor]) -> dict[nn.Module, bool]:
    """The models under watch that have adapters and any of the parameters, and whether their first that trains is."""
    known = _optimizers.setdefault(optimizer, _Optimizer())
    if known.models is None or known.size != len(parameters):
        held = {id(parameter) for parameter in parameters}
        known.size = len(parameters)
        known.models = [
            (weakref.ref(model), id(next((p for p in model.parameters() if p.requires_grad), None)) in held)
            for model, watched in list(_watched.items())
            if any(isinstance(module, watched.layer_class) for module in model.modules())
            and any(id(parameter) in held for parameter in model.parameters())
        ]
    return {model: has_first for reference, has_first in known.models if (model := reference()) is not None}


def _updates(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer holds a parameter of the model in a group whose learning rate is above zero."""
    updated = {id(p) for group in optimizer.param_groups if float(group.get("lr", 1)) > 0 for p in group["params"]}
    return any(id(parameter) in updated for parameter in model.parameters())


def _is_captured(parameters: list[torch.Tensor]) -> bool:
    """Whether the step is recorded in a CUDA graph, which cannot wait for the GPU."""
    return parameters[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _not_finite(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Above 0 if a gradient is not finite, in any process if parameters are sharded: a scalar on the device."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gradients = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    # the largest magnitude overflows in no dtype
    largest = get_total_norm([gradient for gradient in gradients if gradient.numel()], math.inf)
    bad = largest.isfinite().logical_not_().float()
    for mesh in {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}:
        bad = DTensor.from_local(bad, mesh, [Partial()] * mesh.ndim).full_tensor()
    return bad


def _read(numbers: list[torch.Tensor | None]) -> list[float]:
    """Numbers on the device, all waited for at once; 0 for None."""
    found = [torch.zeros(()) if number is None else number.float() for number in numbers]
    return torch.stack([number.to(found[0].device) for number in found]).tolist()
