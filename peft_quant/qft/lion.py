"""Lion (Chen et al., 2023, arXiv 2302.06675) on int8 weights, gradients and momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from .. import ops
from .gradients import GradientStack
from .weight import Int8Weight


Rounding = Literal["stochastic", "nearest", "error_feedback"]

_ROUNDINGS = {"nearest": ops.NEAREST, "stochastic": ops.STOCHASTIC, "error_feedback": ops.ERROR_FEEDBACK}
_UPDATE_STREAM, _REFRESH_STREAM, _RESIDUAL_STREAM = 0, 2, 3  # streams of random keys


class QuantizedLion(torch.optim.Optimizer):
    """Lion with int8 states, for `Int8Weight` and for floating point parameters.

    It takes gradients from autograd while backward runs (`gradients`), so `.grad` is None afterwards and cannot be
    clipped from outside: use the optimizer's `clip_grad_norm_` between backward and `step`. A step whose gradients are
    not finite changes nothing and is counted.

    Args:
        params: parameters or groups of them; `Int8Weight`, fp32, bf16 or fp16.
        lr: learning rate, the amount by which every weight moves in a step.
        betas: coefficients of the update and of the momentum.
        weight_decay: decoupled weight decay, as in AdamW.
        rounding: rounding of int8 weights: `"stochastic"`; `"nearest"`, which loses nearly every update; or
            `"error_feedback"`, to nearest with the remainder kept in one more byte per weight. 16-bit parameters are
            rounded stochastically, unless this is `"nearest"`.
        state_bits: 8 for int8 momentum, or 32 for fp32.
        fused: update each parameter during backward, as soon as its gradient is computed, and store no gradient.
            One backward per step, and no clipping by the norm of all gradients.
        max_parameter_norm: if fused, clip the gradient of each parameter to this norm.
        refresh_steps: number of steps between recomputations of the outliers and scales of int8 weights
            (`Int8Weight.refresh`); 0 for never. Without them no weight but an outlier can grow beyond its row's
            largest.
        seed: seed of the stochastic rounding.

    Raises:
        ValueError: a value is out of range, options exclude each other, or a parameter has another dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        rounding: Rounding = "stochastic",
        state_bits: Literal[8, 32] = 8,
        fused: bool = False,
        max_parameter_norm: float | None = None,
        refresh_steps: int = 100,
        seed: int = 0,
    ) -> None:
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr is finite and at least 0, found {lr}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are in [0, 1), found {betas}. The usual ones are (0.9, 0.99).")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is at least 0, found {weight_decay}.")
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(_ROUNDINGS)}, found {rounding!r}.")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits is 8 or 32, found {state_bits}.")
        if max_parameter_norm is not None and not (fused and max_parameter_norm > 0):
            raise ValueError(
                f"max_parameter_norm is above 0 and for fused=True, found {max_parameter_norm} with fused={fused}. "
                "Otherwise call clip_grad_norm_ before each step."
            )
        if not (isinstance(refresh_steps, int) and refresh_steps >= 0):
            raise ValueError(f"refresh_steps is a number of steps, or 0 for never, found {refresh_steps!r}.")
        self.rounding = rounding
        self.state_bits = state_bits
        self.fused = fused
        self.max_parameter_norm = max_parameter_norm
        self.refresh_steps = refresh_steps
        self.gradients = GradientStack(seed, self._fused_update if fused else None)
        self._max_norm = math.inf
        self._norm: torch.Tensor | None = None
        self._updated: set[torch.Tensor] = set()
        self._places: dict[torch.Tensor, tuple[int, int]] = {}  # index of the group, and in it
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "steps": 0, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not parameter.is_contiguous():
                raise ValueError(
                    f"Parameters are contiguous and in fp32, bf16 or fp16, found {parameter.dtype} of the shape "
                    f"{tuple(parameter.shape)}."
                )
            self._places[parameter] = len(self.param_groups) - 1, len(self._places)
        self.gradients.attach(parameters)

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because gradients were not finite; if fused, the most of any parameter."""
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        return int(torch.stack([count.to(counts[0].device) for count in counts]).max()) if counts else 0

    @property
    def has_momentum(self) -> bool:
        """Whether any gradient so far was not zero."""
        name = "momentum_scales" if self.state_bits == 8 else "momentum"
        return any(bool(state[name].any()) for state in self.state.values())

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Make the next step scale all gradients so that their total norm is at most `max_norm`.

        Returns:
            The norm before clipping, an fp32 scalar on the device.

        Raises:
            RuntimeError: the optimizer is fused, so no gradients are left.
        """
        if self.fused:
            raise RuntimeError(
                "With fused=True each gradient is gone before the norm of all is known. Clip by parameter "
                "(max_parameter_norm), or use fused=False."
            )
        self._max_norm, self._norm = max_norm, self.gradients.norm()
        return self._norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.gradients.clear()
        self._updated.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient on the stack, the last one first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._norm if self._norm is not None else self.gradients.norm()
        while self.gradients:
            parameter, gradient = self.gradients.pop()
            self._update(parameter, gradient.codes, gradient.scales, norm, self._max_norm)
        for group in self.param_groups:
            group["steps"] += 1
        self.gradients.steps += 1
        self._max_norm, self._norm = math.inf, None
        self._updated.clear()
        return loss

    def _fused_update(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if parameter in self._updated:
            raise RuntimeError(
                "A parameter got a second gradient before `step`: with fused=True the first one has been applied and "
                "is gone. Use gradient_accumulation_steps=1 and non-reentrant checkpointing, or fused=False."
            )
        self._updated.add(parameter)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._update(parameter, gradient, None, norm, self.max_parameter_norm or math.inf)

    def _update(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        gradient_scales: torch.Tensor | None,
        norm: torch.Tensor,
        max_norm: float,
    ) -> None:
        state = self._state(parameter)
        place, number = self._places[parameter]
        group = self.param_groups[place]
        int8 = parameter if isinstance(parameter, Int8Weight) else None
        weight, scales = (int8.codes, int8.scales) if int8 is not None else (parameter.detach(), None)
        norm = norm.to(parameter.device)
        step = ops.LionStep(
            weight,
            scales,
            gradient,
            gradient_scales,
            state["momentum"],
            state.get("momentum_scales"),
            state.get("residual"),
            norm,
            state["skipped"],
            max_norm,
            group["lr"],
            group["betas"][0],
            group["betas"][1],
            group["weight_decay"],
            _ROUNDINGS[self.rounding],
            ops.random_key(group["seed"], _UPDATE_STREAM, number, group["steps"]),
        )
        ops.lion_step(step)
        torch.autograd.graph.increment_version([parameter, weight])
        if int8 is None:
            return
        if int8.outlier_values is not None and group["weight_decay"]:
            decay = 1 - group["lr"] * group["weight_decay"]
            int8.outlier_values.mul_(torch.where(norm.isfinite(), decay, 1))
        if self.refresh_steps and (group["steps"] + 1) % self.refresh_steps == 0 and norm.isfinite():
            int8.refresh(ops.random_key(group["seed"], _REFRESH_STREAM, number, group["steps"]))

    def _state(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            device = parameter.device
            dtype = torch.int8 if self.state_bits == 8 else torch.float32
            state["momentum"] = torch.zeros(parameter.shape, dtype=dtype, device=device)
            if self.state_bits == 8:
                state["momentum_scales"] = torch.zeros(ops.blocks_of(parameter.numel()), device=device)
            if self.rounding == "error_feedback" and isinstance(parameter, Int8Weight):
                place, number = self._places[parameter]
                key = ops.random_key(self.param_groups[place]["seed"], _RESIDUAL_STREAM, number)
                state["residual"] = ops.random_residual(parameter.codes, key)
            state["skipped"] = torch.zeros((), dtype=torch.int32, device=device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states without casting them, int8 ones included.

        Raises:
            ValueError: the states belong to other parameters, or were saved with another `state_bits` or `rounding`.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters):
            if number not in state_dict["state"]:
                continue
            expected = {name: (t.dtype, t.shape) for name, t in self._state(parameter).items()}
            loaded = state_dict["state"][number]
            found = {name: (t.dtype, t.shape) for name, t in loaded.items()}
            if found != expected:
                raise ValueError(
                    f"The state of parameter {number} does not fit this optimizer, which would have {expected}; the "
                    f"state dict has {found}. Use the model, state_bits and rounding it was saved with."
                )
            self.state[parameter] = {name: t.to(parameter.device, copy=True) for name, t in loaded.items()}
        self.gradients.clear()
        self.gradients.steps = self.param_groups[0]["steps"]
        self._updated.clear()
