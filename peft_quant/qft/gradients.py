"""Gradients in int8, encoded as soon as autograd computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops


_STREAM = 1  # stream of random keys; `lion.py` uses the others


@dataclass(slots=True)
class QuantizedGradient:
    """A gradient in int8, or the sum of several.

    Attributes:
        codes: int8, in the parameter's shape.
        scales: fp32, one per block of 256 elements.
        square: the squared norm before rounding, an fp32 scalar on the device; not finite if an element is not.
        count: number of gradients in the sum.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    square: torch.Tensor
    count: int = 1

    def dequantize(self) -> torch.Tensor:
        """The gradient in fp32, in the parameter's shape."""
        return ops.decode_blocks(self.codes, self.scales)


class GradientStack:
    """Takes each gradient from autograd as soon as it is computed, so that only one exists in floating point.

    Further gradients of a parameter are added to the one on the stack, without bias (stochastic rounding). The last
    gradient pushed is the first popped.

    Args:
        seed: seed of the rounding.
        fused: if given, called with each parameter and its dense gradient; the stack then stays empty.

    Attributes:
        steps: optimizer steps taken so far, counted by the optimizer; seeds the rounding together with `seed`.
    """

    def __init__(self, seed: int = 0, fused: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> None:
        self.seed = seed
        self.fused = fused
        self.steps = 0
        self._numbers: dict[torch.Tensor, int] = {}
        self._entries: dict[torch.Tensor, QuantizedGradient] = {}
        self._hooks: dict[torch.Tensor, Any] = {}

    def attach(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take the gradients of parameters from now on, instead of their `.grad`.

        Idempotent; call it again after `Module.to`.
        """
        for parameter in parameters:
            if parameter.requires_grad:
                self._numbers.setdefault(parameter, len(self._numbers))
                if parameter not in self._hooks:
                    self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._take)
                # Module.to replaces a parameter's tensor with one that has no hooks
                parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks

    def detach(self) -> None:
        """Let autograd set `.grad` again, and drop the gradients on the stack."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self.clear()

    @torch.no_grad()
    def _take(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self.fused is not None:
            self.fused(parameter, gradient)
        else:
            self.push(parameter, gradient)

    @torch.no_grad()
    def push(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Put a parameter's dense gradient on the stack, or add it to the one already there."""
        entry = self._entries.get(parameter)
        number = self._numbers.setdefault(parameter, len(self._numbers))
        key = ops.random_key(self.seed, _STREAM, self.steps, number, 0 if entry is None else entry.count)
        if entry is None:
            codes, scales, squares = ops.encode_gradient(gradient, key)
            self._entries[parameter] = QuantizedGradient(codes, scales, squares.sum())
        else:
            entry.square = ops.accumulate_gradient(entry.codes, entry.scales, gradient, key).sum()
            entry.count += 1

    def pop(self) -> tuple[torch.Tensor, QuantizedGradient]:
        """Remove and return the last gradient, after its parameter."""
        return self._entries.popitem()

    def norm(self) -> torch.Tensor:
        """The total norm of the gradients on the stack, an fp32 scalar on the device; not finite if one is not."""
        squares = [entry.square for entry in self._entries.values()]
        if not squares:
            return torch.zeros(())
        return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()

    def clear(self) -> None:
        self._entries.clear()

    @property
    def bytes_held(self) -> int:
        return sum(entry.codes.nbytes + entry.scales.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return parameter in self._entries
