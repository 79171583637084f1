"""The packed operators as PyTorch knows them: schemas, shape functions and dispatch.

Symbols: `M` tokens (any number of leading dimensions), `K` in-features, `N` out-features, `G` groups, `b` bits.

| argument | shape, dtype | meaning |
|---|---|---|
| `x`, `dy` | `[..., K]`, `[..., N]`, floating point | activations, gradient of the output |
| `qweight` | `[K * b / 32, N]` int32 | packed codes |
| `qzeros` | `[G, N * b / 32]` int32 | packed zero points |
| `scales` | `[G, N]` floating point | scales; the product is formed with their fp32 value |
| `g_idx` | `[K]` int32, or None | group of every row (act-order); None when row `k` is in group `k // group_size` |
| `zero_offset` | 0 or 1 | 0: `gptq_v2` zero points, 1: `gptq` (v1) ones, stored minus one |

`add_product_` adds the low-rank branch, `y += scaling * a @ b` of `[M, R]` and `[R, N]`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import eager
from .autograd import PackedLinear, PackedLoraLinear


_PACKED = "Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, int bits, int group_size, int zero_offset"

_SCHEMAS = {
    "dequantize": f"({_PACKED}, ScalarType dtype) -> Tensor",
    "linear": f"(Tensor x, {_PACKED}) -> Tensor",
    "linear_grad_x": f"(Tensor dy, {_PACKED}) -> Tensor",
    "add_product_": "(Tensor(a!) y, Tensor a, Tensor b, float scaling) -> ()",
    "linear_grad_scales": f"(Tensor x, Tensor dy, {_PACKED.replace('Tensor scales, ', '')}) -> Tensor",
}


@cache
def _kernels(name: str) -> ModuleType | None:
    """A module of Triton kernels, which is imported at the first product on a GPU; None without Triton."""
    try:
        return import_module(f".{name}", __package__)
    except ImportError:
        return None


def define(name: str, schema: str, path: ModuleType, kernels: str, opened: bool) -> None:
    """An operator that is the function of its name of one module, and on a GPU of the module named `kernels`.

    If `opened`, compiled code on a GPU launches its kernels and products itself, which is cheaper.
    """
    operator = f"peft_quant::{name}"
    torch.library.define(operator, schema)
    torch.library.impl(operator, "default", getattr(path, name))
    torch.library.impl(operator, "cuda", lambda *arguments: getattr(_kernels(kernels) or path, name)(*arguments))

    def trace(mode: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        module = (args[0].is_cuda and _kernels(kernels)) or path
        if module is path:  # whose many small operations the compiler is not to see
            return mode.__torch_dispatch__(function, types, args, kwargs)
        with mode:
            return getattr(module, name)(*args, **(kwargs or {}))

    if opened:
        torch.library.register_torch_dispatch(operator, FunctionalTensorMode, trace)


for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, eager, "triton", opened=True)


@torch.library.register_fake("peft_quant::dequantize")
def _(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype):
    return qweight.new_empty(qweight.shape[0] * 32 // bits, qweight.shape[1], dtype=dtype)


@torch.library.register_fake("peft_quant::linear")
def _(x, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset):
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


@torch.library.register_fake("peft_quant::linear_grad_x")
def _(dy, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset):
    return dy.new_empty(*dy.shape[:-1], qweight.shape[0] * 32 // bits)


@torch.library.register_fake("peft_quant::add_product_")
def _(y, a, b, scaling):
    return None


@torch.library.register_fake("peft_quant::linear_grad_scales")
def _(x, dy, qweight, qzeros, g_idx, bits, group_size, zero_offset):
    return x.new_empty(qzeros.shape[0], qweight.shape[1], dtype=torch.float32)


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`W[k, n] = scales[g(k), n] * (q[k, n] - z[g(k), n])`, dense `[K, N]` in `dtype` (GPTQ). Not differentiable."""
    return torch.ops.peft_quant.dequantize(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, dtype)


# Dynamo would trace into their autograd Functions, and before PyTorch 2.13 lose there what checkpointing recomputes
@torch.compiler.allow_in_graph
def linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor:
    """`y = x @ W` with `W` packed: `[..., K]` -> `[..., N]` in the dtype of `x`; differentiable in `x` and `scales`.

    The gradient of `scales` has their dtype: pass them in fp32 where they train.
    """
    # generating a token on a CPU, the autograd Function takes a tenth of the time
    product = PackedLinear.apply if torch.is_grad_enabled() else torch.ops.peft_quant.linear
    return product(x, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset)


@torch.compiler.allow_in_graph
def lora_linear(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor:
    """`y = x @ W + scaling * (x @ A^T) @ B^T` (LoRA, Hu et al., 2021, arXiv 2106.09685) with `W` packed.

    `lora_a` is `[R, K]`, `lora_b` `[N, R]`, both floating point, for a rank of `R`; products are formed in the dtype
    of `x`. Differentiable in `x`, `lora_a` and `lora_b`.
    """
    return PackedLoraLinear.apply(
        x, lora_a, lora_b, scaling, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset
    )
