"""The packed operators: schemas, shapes and checks. `eager.py` and `triton.py` implement them.

Symbols: `M` tokens (any number of leading dimensions), `K` in-features, `N` out-features, `G` groups, `b` bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..dispatch import FLOATING_POINT, check_tensor, define
from .packing import SUPPORTED_BITS, WORD_BITS


class PackedWeight(NamedTuple):
    """A weight `[K, N]` as GPTQ packs it: `W[k, n] = scales[g(k), n] * (q[k, n] - z[g(k), n])`.

    Attributes:
        qweight: packed codes, int32 `[K * b / 32, N]`.
        qzeros: packed zero points, int32 `[G, N * b / 32]`.
        scales: floating point `[G, N]`; products use their fp32 values.
        g_idx: group of every row, int32 `[K]` (act-order); None when row `k` is in group `k // group_size`.
        bits: bits per code: 2, 3, 4 or 8.
        group_size: rows per group.
        zero_offset: 0 for `gptq_v2` zero points, 1 for `gptq` (v1) ones, which are stored minus one.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None
    bits: int
    group_size: int
    zero_offset: int

    @property
    def rows(self) -> int:
        return self.qweight.shape[0] * WORD_BITS // self.bits

    @property
    def columns(self) -> int:
        return self.qweight.shape[1]


_CODES = "Tensor qweight, Tensor qzeros"
_LAYOUT = "Tensor? g_idx, int bits, int group_size, int zero_offset"
_WEIGHT = f"{_CODES}, Tensor scales, {_LAYOUT}"


def _check_weight(weight: PackedWeight) -> None:
    bits, groups, columns = weight.bits, weight.qzeros.shape[0], weight.columns
    torch._check(bits in SUPPORTED_BITS, lambda: f"bits is 2, 3, 4 or 8, found {bits}.")
    torch._check(weight.zero_offset in (0, 1), lambda: f"zero_offset is 0 or 1, found {weight.zero_offset}.")
    check_tensor("qweight", weight.qweight, (torch.int32,), weight.rows * bits // WORD_BITS, columns)
    check_tensor("qzeros", weight.qzeros, (torch.int32,), groups, columns * bits // WORD_BITS)
    check_tensor("scales", weight.scales, FLOATING_POINT, groups, columns)
    check_tensor("g_idx", weight.g_idx, (torch.int32, torch.int64), weight.rows)


@define(f"({_WEIGHT}, ScalarType dtype) -> Tensor")
def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight `[K, N]` in `dtype`. Not differentiable."""
    _check_weight(weight)
    return weight.qweight.new_empty(weight.rows, weight.columns, dtype=dtype)


@define(f"(Tensor x, {_WEIGHT}) -> Tensor")
def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`y = x @ W`: `[..., K]` -> `[..., N]` in the dtype of `x`."""
    _check_weight(weight)
    check_tensor("x", x, FLOATING_POINT, *x.shape[:-1], weight.rows)
    return x.new_empty(*x.shape[:-1], weight.columns)


@define(f"(Tensor dy, {_WEIGHT}) -> Tensor")
def linear_grad_x(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`dx = dy @ W^T`: `[..., N]` -> `[..., K]` in the dtype of `dy`."""
    _check_weight(weight)
    check_tensor("dy", dy, FLOATING_POINT, *dy.shape[:-1], weight.columns)
    return dy.new_empty(*dy.shape[:-1], weight.rows)


@define(f"(Tensor x, Tensor dy, {_CODES}, {_LAYOUT}) -> Tensor")
def linear_grad_scales(
    x: torch.Tensor, dy: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, *layout: Any
) -> torch.Tensor:
    """`ds[g, n] = sum over k in group g of (x^T dy)[k, n] * (q - z)[k, n]`: fp32 `[G, N]`; needs no scales."""
    groups, columns = qzeros.shape[0], qweight.shape[1]
    weight = PackedWeight(qweight, qzeros, x.new_empty(groups, columns), *layout)
    _check_weight(weight)
    check_tensor("x", x, FLOATING_POINT, *dy.shape[:-1], weight.rows)
    check_tensor("dy", dy, FLOATING_POINT, *x.shape[:-1], columns)
    return x.new_empty(groups, columns, dtype=torch.float32)


@define("(Tensor(a!) y, Tensor a, Tensor b, float scaling) -> ()")
def add_product_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """`y += scaling * a @ b` for `a` `[M, R]` and `b` `[R, N]`: the product of a LoRA adapter."""
    check_tensor("y", y, FLOATING_POINT, a.shape[0], b.shape[1])
    check_tensor("a", a, FLOATING_POINT, y.shape[0], b.shape[0])
    check_tensor("b", b, FLOATING_POINT, a.shape[1], y.shape[1])
