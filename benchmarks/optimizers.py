"""Optimizers of the cells of `train_step.py`. Packages are imported lazily, because a peer's must come first."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_quant import QuantizedLion


LEARNING_RATE = 1e-5
MAX_NORM = 1.0


def make_optimizer(cell: argparse.Namespace, parameters: list[nn.Parameter]) -> Any:
    """The cell's optimizer, or an object with the same `step` and `zero_grad`.

    A `qft-stack` step clips by the norm of all gradients, which is the purpose of that mode.
    """
    if cell.method.startswith("qft"):
        from peft_quant import QuantizedLion

        fused = cell.method == "qft-fused"
        return _Clipping(QuantizedLion(parameters, LEARNING_RATE, fused=fused), None if fused else MAX_NORM)
    make = _CLASSES[cell.optimizer]
    return _InBackward(parameters, make) if cell.in_backward else make(parameters)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(parameters, lr=LEARNING_RATE, fused=parameters[0].is_cuda)


def _adamw_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LEARNING_RATE)


def _torchao_adamw_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LEARNING_RATE)


def _lion_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion8bit

    return Lion8bit(parameters, lr=LEARNING_RATE)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torch.optim import SGD

    return SGD(parameters, lr=LEARNING_RATE, foreach=False)


_CLASSES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw_8bit,
    "torchao-adamw8bit": _torchao_adamw_8bit,
    "lion8bit": _lion_8bit,
    "sgd": _sgd,
}
OPTIMIZERS = tuple(_CLASSES)


class _Clipping:
    def __init__(self, optimizer: QuantizedLion, max_norm: float | None) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        if self.max_norm is not None:
            self.optimizer.clip_grad_norm_(self.max_norm)
        self.optimizer.step()


class _InBackward:
    """Updates every parameter as soon as its gradient exists, and keeps none (LOMO, Lv et al., arXiv 2306.09782)."""

    def __init__(
        self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        for parameter in parameters:
            optimizer = make([parameter])

            def update(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(update)

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...
