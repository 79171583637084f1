"""Definition and dispatch of the operators in `torch.ops.peft_quant`, and what depends on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, update_wrapper
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import torch
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.library import wrap_triton


P = ParamSpec("P")
R = TypeVar("R")

FLOATING_POINT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Operator(Generic[P, R]):
    """An operator that runs Triton kernels on a GPU if Triton is installed, and plain PyTorch otherwise.

    The decorators `eager` and `triton` register its implementations. The `triton.py` of its family is imported on the
    first call on a GPU. A NamedTuple argument is flattened: the schema lists its fields one by one.
    """

    def __init__(self, fake: Callable[P, R], schema: str, inline: bool) -> None:
        update_wrapper(self, fake)
        self._name = f"peft_quant::{fake.__name__}"
        self._family = fake.__module__.rpartition(".")[0]
        types = enumerate(get_type_hints(fake).values())
        self._tuple: Any = next(((at, kind) for at, kind in types if hasattr(kind, "_fields")), None)
        self._eager: Callable[..., R]
        self._triton: Callable[..., R]
        torch.library.define(self._name, schema)
        torch.library.register_fake(self._name, self._flat(fake))
        torch.library.impl(self._name, "cuda", self._run_on_gpu)
        if inline:
            torch.library.register_torch_dispatch(self._name, FunctionalTensorMode, self._trace)
        self._operator = getattr(torch.ops.peft_quant, fake.__name__)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._tuple is None:
            return self._operator(*args, **kwargs)
        at, _ = self._tuple
        return self._operator(*args[:at], *args[at], *args[at + 1 :], **kwargs)

    def eager(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorates the implementation in plain PyTorch."""
        self._eager = self._flat(function)
        torch.library.impl(self._name, "default", self._eager)
        return function

    def triton(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorates the implementation that launches Triton kernels."""
        self._triton = self._flat(function)
        return function

    def _flat(self, function: Callable[..., R]) -> Callable[..., R]:
        """Wrap the function to take the flattened arguments of the schema."""
        if self._tuple is None:
            return function
        at, kind = self._tuple
        stop = at + len(kind._fields)
        return lambda *args: function(*args[:at], kind(*args[at:stop]), *args[stop:])

    def _run_on_gpu(self, *args: Any) -> R:
        return (self._triton if _import_kernels(self._family) else self._eager)(*args)

    def _trace(self, mode: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args[0].is_cuda and _import_kernels(self._family):
            with mode:
                return self._triton(*args, **(kwargs or {}))
        # keep the many small operations of `eager` opaque to the compiler
        return mode.__torch_dispatch__(function, types, args, kwargs)


def define(schema: str, *, inline: bool = True) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Define an operator by its fake function, which names it, checks its arguments and returns results without data.

    Args:
        schema: arguments and results, in the syntax of `torch.library.define`.
        inline: whether compiled code on a GPU launches the kernels and products directly, which is cheaper.
    """
    return lambda fake: Operator(fake, schema, inline)


@cache
def _import_kernels(family: str) -> bool:
    if find_spec("triton") is None:
        return False
    import_module(f"{family}.triton")
    return True


def launcher(kernel: Any, tensor: torch.Tensor) -> Any:
    """The Triton kernel, wrapped so that the compiler can trace it if the tensor is being traced."""
    return wrap_triton(kernel) if isinstance(tensor, FunctionalTensor) else kernel


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to multiply in: fp32 on the CPU, where bf16 without AVX512-BF16 is two orders of magnitude slower."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


def check_tensor(name: str, tensor: torch.Tensor | None, dtypes: tuple[torch.dtype, ...], *shape: int) -> None:
    """Check the dtype and the shape of an argument, unless it is None.

    Raises:
        RuntimeError: it has another dtype or shape.
    """
    if tensor is not None:
        torch._check(
            tensor.dtype in dtypes and tensor.shape == shape,
            lambda: f"{name} is {' or '.join(map(str, dtypes))} {shape}, found {tensor.dtype} {tuple(tensor.shape)}.",
        )
