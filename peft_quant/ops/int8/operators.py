"""The int8 operators of QFT: schemas, shapes and checks. `eager.py` and `triton.py` implement them.

Symbols: `N` out-features, `K` in-features, `G` groups per row, `R` outliers per row, `B` blocks of 256 elements.
Gradients and momentum are encoded as int8 codes of any shape and fp32 scales `[B]`, one per 256 consecutive elements.
`key` seeds the stochastic rounding (`random_key`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dispatch import FLOATING_POINT, check_tensor, define


BLOCK = 256
NEAREST, STOCHASTIC, ERROR_FEEDBACK = range(3)

_FP32, _INT8 = (torch.float32,), (torch.int8,)


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK)


class EncodedWeight(NamedTuple):
    """A weight `[N, K]` in int8: `W[n, k] = codes[n, k] * scales[n, k // (K / G)]`, plus the values of outliers.

    Attributes:
        codes: int8 `[N, K]`.
        scales: fp32 `[N, G]`.
        columns: columns of the outliers, int16 (int32 if K > 32768) `[N, R]`; None without outliers.
        values: values of the outliers, fp32 `[N, R]`, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    columns: torch.Tensor | None
    values: torch.Tensor | None


class LionStep(NamedTuple):
    """Arguments of a Lion step. Tensors are contiguous: int8 if they have scales, otherwise floating point.

    Attributes:
        weight: the weight, of any shape.
        weight_scales: fp32 `[N, G]`, or None.
        gradient: the gradient, in the shape of the weight.
        gradient_scales: fp32 `[B]`, or None.
        momentum: the momentum, in the shape of the weight; fp32 without scales.
        momentum_scales: fp32 `[B]`, or None.
        residual: rounding remainder of each code, int8, in units of 1/256 of a code.
        norm: norm of all gradients, an fp32 scalar.
        skipped: number of steps skipped because `norm` was not finite, an int32 scalar.
        max_norm: the gradient is scaled so that `norm` becomes at most this.
        lr: learning rate.
        beta1: coefficient of the update.
        beta2: coefficient of the momentum.
        weight_decay: decoupled weight decay, as in AdamW.
        rounding: rounding of an int8 weight: NEAREST, STOCHASTIC or ERROR_FEEDBACK, which needs `residual`. A 16-bit
            weight is rounded to nearest with NEAREST, and stochastically otherwise.
        key: key of the stochastic rounding.
    """

    weight: torch.Tensor
    weight_scales: torch.Tensor | None
    gradient: torch.Tensor
    gradient_scales: torch.Tensor | None
    momentum: torch.Tensor
    momentum_scales: torch.Tensor | None
    residual: torch.Tensor | None
    norm: torch.Tensor
    skipped: torch.Tensor
    max_norm: float
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    rounding: int
    key: int


_WEIGHT = "Tensor codes, Tensor scales, Tensor? columns, Tensor? values"


def _check_weight(weight: EncodedWeight) -> None:
    rows, width = weight.codes.shape
    check_tensor("codes", weight.codes, _INT8, rows, width)
    check_tensor("scales", weight.scales, _FP32, rows, weight.scales.shape[-1])
    if weight.columns is not None:
        check_tensor("columns", weight.columns, (torch.int16, torch.int32), rows, weight.columns.shape[-1])
        check_tensor("values", weight.values, _FP32, *weight.columns.shape)


@define("(Tensor x, int key) -> (Tensor, Tensor, Tensor)", inline=False)
def encode_gradient(x: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a floating point tensor stochastically.

    Returns:
        Codes in the shape of `x`, scales `[B]` and sums of squares `[B]`. Where a block is not finite, or its sum of
        squares overflows, its scale and sum are not finite.
    """
    check_tensor("x", x, FLOATING_POINT, *x.shape)
    scales, squares = (x.new_empty(blocks_of(x.numel()), dtype=torch.float32) for _ in range(2))
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scales, squares


@define("(Tensor(a!) codes, Tensor(b!) scales, Tensor x, int key) -> Tensor", inline=False)
def accumulate_gradient(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, key: int) -> torch.Tensor:
    """Add a floating point tensor to an encoded one, in place and stochastically.

    Returns:
        Sums of squares `[B]` of the result.
    """
    check_tensor("x", x, FLOATING_POINT, *x.shape)
    check_tensor("codes", codes, _INT8, *x.shape)
    check_tensor("scales", scales, _FP32, blocks_of(x.numel()))
    return torch.empty_like(scales)


@define(f"({_WEIGHT}, ScalarType dtype) -> Tensor")
def decode_weight(weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight `[N, K]`, computed in fp32 and rounded to `dtype` once. Not differentiable."""
    _check_weight(weight)
    return torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)


@define(f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
def int8_linear(x: torch.Tensor, weight: EncodedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`y = x @ W^T + bias` in the dtype of `x`: `[..., K]` -> `[..., N]`. Not differentiable."""
    _check_weight(weight)
    rows, width = weight.codes.shape
    check_tensor("x", x, FLOATING_POINT, *x.shape[:-1], width)
    check_tensor("bias", bias, (x.dtype,), rows)
    return x.new_empty(*x.shape[:-1], rows)


@define(f"(Tensor dy, {_WEIGHT}) -> Tensor")
def int8_linear_grad_x(dy: torch.Tensor, weight: EncodedWeight) -> torch.Tensor:
    """`dx = dy @ W` in the dtype of `dy`: `[..., N]` -> `[..., K]`."""
    _check_weight(weight)
    rows, width = weight.codes.shape
    check_tensor("dy", dy, FLOATING_POINT, *dy.shape[:-1], rows)
    return dy.new_empty(*dy.shape[:-1], width)


@define(
    "(Tensor(a!) weight, Tensor? weight_scales, Tensor gradient, Tensor? gradient_scales, Tensor(b!) momentum, "
    "Tensor(c!)? momentum_scales, Tensor(d!)? residual, Tensor norm, Tensor(e!) skipped, float max_norm, "
    "float lr, float beta1, float beta2, float weight_decay, int rounding, int key) -> ()",
    inline=False,
)
def lion_step(step: LionStep) -> None:
    """A step of Lion, in place. If `norm` is not finite, `skipped` is incremented and nothing else changes."""
    shape, blocks = step.weight.shape, blocks_of(step.weight.numel())
    check_tensor("weight", step.weight, FLOATING_POINT if step.weight_scales is None else _INT8, *shape)
    check_tensor("gradient", step.gradient, FLOATING_POINT if step.gradient_scales is None else _INT8, *shape)
    check_tensor("gradient_scales", step.gradient_scales, _FP32, blocks)
    check_tensor("momentum", step.momentum, _FP32 if step.momentum_scales is None else _INT8, *shape)
    check_tensor("momentum_scales", step.momentum_scales, _FP32, blocks)
    check_tensor("residual", step.residual, _INT8, *shape)
    check_tensor("norm", step.norm, _FP32)
    check_tensor("skipped", step.skipped, (torch.int32,))
    torch._check(
        step.rounding != ERROR_FEEDBACK or step.residual is not None or step.weight_scales is None,
        lambda: "ERROR_FEEDBACK of an int8 weight needs a residual.",
    )
