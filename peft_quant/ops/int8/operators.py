"""The int8 operators of QFT as PyTorch knows them: schemas, shape functions and dispatch.

Symbols: `N` out-features, `K` in-features, `G` groups of a row, `R` outliers of a row, `B` blocks of 256 elements.

| argument | shape, dtype | meaning |
|---|---|---|
| `codes`, `scales` | `[N, K]` int8, `[N, G]` fp32 | of a weight: `W[n, k] = codes[n, k] * scales[n, k // (K / G)]` |
| `columns`, `values` | `[N, R]` int16 or int32, fp32, or None | outliers of a weight: what is added, and where |
| `codes`, `scales` | any shape int8, `[B]` fp32 | of a gradient or of momentum: 256 elements in a row share a scale |
| `residual` | as the weight, int8, or None | what rounding left of a code, in 1/256 of it |
| `norm`, `skipped` | scalars, fp32 and int32 | norm of all gradients; steps skipped because it was not finite |
| `key` | int | of the stochastic rounding (`random_key`) |
"""

from __future__ import annotations

import torch

from ..packed.operators import define
from . import eager as int8


_WEIGHT = "Tensor codes, Tensor scales, Tensor? columns, Tensor? values"

_SCHEMAS = {
    "encode_gradient": "(Tensor x, int key) -> (Tensor, Tensor, Tensor)",
    "accumulate_gradient": "(Tensor(a!) codes, Tensor(b!) scales, Tensor x, int key) -> Tensor",
    "decode_weight": f"({_WEIGHT}, ScalarType dtype) -> Tensor",
    "int8_linear": f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
    "int8_linear_grad_x": f"(Tensor dy, {_WEIGHT}) -> Tensor",
    "lion_step": (
        "(Tensor(a!) weight, Tensor? weight_scales, Tensor gradient, Tensor? gradient_scales, Tensor(b!) momentum, "
        "Tensor(c!)? momentum_scales, Tensor(d!)? residual, Tensor norm, Tensor(e!) skipped, float max_norm, "
        "float lr, float beta1, float beta2, float weight_decay, int rounding, int key) -> ()"
    ),
}


_OPENED = ("decode_weight", "int8_linear", "int8_linear_grad_x")


for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, int8, "int8_triton", opened=_name in _OPENED)


@torch.library.register_fake("peft_quant::encode_gradient")
def _(x, key):
    blocks = int8.blocks_of(x.numel())
    scales, squares = (x.new_empty(blocks, dtype=torch.float32) for _ in range(2))
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scales, squares


@torch.library.register_fake("peft_quant::accumulate_gradient")
def _(codes, scales, x, key):
    return torch.empty_like(scales)


@torch.library.register_fake("peft_quant::decode_weight")
def _(codes, scales, columns, values, dtype):
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@torch.library.register_fake("peft_quant::int8_linear")
def _(x, codes, scales, columns, values, bias):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("peft_quant::int8_linear_grad_x")
def _(dy, codes, scales, columns, values):
    return dy.new_empty(*dy.shape[:-1], codes.shape[1])


@torch.library.register_fake("peft_quant::lion_step")
def _(*arguments):
    return None


def encode_gradient(x: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a floating point tensor stochastically.

    Returns:
        Codes in its shape, scales and sums of squares `[B]`. Scales and sums of a block that is not finite, or whose
        sum of squares overflows, are not finite.
    """
    return torch.ops.peft_quant.encode_gradient(x, key)


def accumulate_gradient(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, key: int) -> torch.Tensor:
    """Add a floating point tensor to an encoded one, in place and stochastically; sums of squares `[B]` of the sum."""
    return torch.ops.peft_quant.accumulate_gradient(codes, scales, x, key)


def decode_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    columns: torch.Tensor | None,
    values: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight `[N, K]`, formed in fp32 and rounded to `dtype` once. Not differentiable."""
    return torch.ops.peft_quant.decode_weight(codes, scales, columns, values, dtype)


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    columns: torch.Tensor | None,
    values: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`y = x @ W^T + bias` in the dtype of `x`: `[..., K]` -> `[..., N]`. Not differentiable."""
    return torch.ops.peft_quant.int8_linear(x, codes, scales, columns, values, bias)


def int8_linear_grad_x(
    dy: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    columns: torch.Tensor | None,
    values: torch.Tensor | None,
) -> torch.Tensor:
    """`dx = dy @ W` in the dtype of `dy`: `[..., N]` -> `[..., K]`."""
    return torch.ops.peft_quant.int8_linear_grad_x(dy, codes, scales, columns, values)


def lion_step(
    weight: torch.Tensor,
    weight_scales: torch.Tensor | None,
    gradient: torch.Tensor,
    gradient_scales: torch.Tensor | None,
    momentum: torch.Tensor,
    momentum_scales: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    skipped: torch.Tensor,
    max_norm: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: int,
    key: int,
) -> None:
    """A step of Lion, in place, on tensors that are int8 where they have scales, and floating point where not.

    The gradient is scaled so that `norm` becomes at most `max_norm`. If `norm` is not finite, `skipped` is counted up
    and nothing else changes. All tensors are contiguous.

    Args:
        rounding: of an int8 weight: NEAREST, STOCHASTIC or ERROR_FEEDBACK, which needs a residual. One in 16 bits is
            rounded to nearest with NEAREST, and stochastically otherwise.
    """
    torch.ops.peft_quant.lion_step(
        weight, weight_scales, gradient, gradient_scales, momentum, momentum_scales, residual, norm, skipped,
        max_norm, lr, beta1, beta2, weight_decay, rounding, key,
    )  # fmt: skip
