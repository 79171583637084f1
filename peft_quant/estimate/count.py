"""Counting the live tensors of a training step on the meta device, as if it ran on a GPU.

Meta tensors have shapes, dtypes and lifetimes, and autograd runs on them. This module adds what depends on the device:
which attention kernel runs, what autocast casts, and what kernels allocate while they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..qft import Int8Weight


aten = torch.ops.aten
ours = torch.ops.peft_quant

WEIGHTS, SCALES, REST, ADAPTER, OPTIMIZER = "weights", "scales", "rest of the model", "adapter", "optimizer"
GRADIENTS, ACTIVATIONS, DECODED, LOGITS = "gradients", "activations", "decoded weights", "logits"
KINDS = (WEIGHTS, SCALES, REST, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, DECODED, LOGITS)
STATES = (WEIGHTS, SCALES, REST, ADAPTER, GRADIENTS, OPTIMIZER)
AFTER_BACKWARD = "after backward"

_ALLOCATION = 512  # bytes; PyTorch's CUDA allocator rounds up to a multiple of it
_TILE_ROWS, _PRODUCT_ROWS = 128, 4096  # block sizes of the scale gradient in `ops/packed/triton.py`

Amounts = dict[str, tuple[int, int]]
"""Bytes and number of values of each kind."""


class Shapes:
    """Runs operators on meta tensors and caches the shapes of their results.

    A repeated call with arguments of the same shapes only creates empty tensors, which is several times faster than
    PyTorch's shape inference.
    """

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._in_place: set[Any] = set()
        self._unknown: set[Any] = set()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in self._unknown:
            return func(*args, **kwargs)
        key = func, _signature(args), _signature(tuple(kwargs.items()))
        if key in self._results:
            return _like(self._results[key])
        if key in self._in_place:
            return args[0]
        result = func(*args, **kwargs)
        if args and result is args[0]:
            self._in_place.add(key)
            return result
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        made = [tensor for tensor in tree_leaves(result) if _is_tensor(tensor)]
        if not made or any(t.untyped_storage()._cdata in given or t.storage_offset() or not t.is_meta for t in made):
            self._unknown.add(func)
        else:
            self._results[key] = _signature(result)
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class _TensorSpec(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _signature(value: Any) -> Any:
    """The cache key of an argument. It includes the type of plain values, because `1 == 1.0 == True`."""
    if isinstance(value, torch.Tensor):
        return _TensorSpec(value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return value if value is None else (type(value), value)


def _like(signature: Any) -> Any:
    if isinstance(signature, _TensorSpec):
        return torch.empty_strided(signature.shape, signature.stride, dtype=signature.dtype, device=signature.device)
    if isinstance(signature, tuple) and not isinstance(signature[0], type):
        return tuple(map(_like, signature))
    return signature if signature is None else signature[1]


class LiveTensors(TorchDispatchMode):
    """Counts live tensors by kind while it is active, and records the peak of each interval between two events.

    Args:
        tokens: number of tokens in the batch. Tensors with `tokens * vocabulary` values whose last dimension is the
            vocabulary are counted as logits.
        vocabulary: size of the vocabulary.
        shapes: cached shapes of results.

    Attributes:
        peaks: amounts at the peak of each interval, by the event that ended the interval.
    """

    def __init__(self, tokens: int, vocabulary: int, shapes: Shapes) -> None:
        super().__init__()
        self._shapes = shapes
        self.peaks: dict[Hashable, Amounts] = {}
        self._logits = tokens * vocabulary
        self._vocabulary = vocabulary
        self._held: dict[int, tuple[weakref.ref[Any], str, int, int]] = {}
        self._bytes = dict.fromkeys(KINDS, 0)
        self._values = dict.fromkeys(KINDS, 0)
        self._total = self._highest = 0
        self._peak: Amounts = {}

    def hold(self, tensor: torch.Tensor, kind: str, values: int | None = None) -> None:
        """Count a tensor, or change the kind of one that is already counted.

        Args:
            tensor: the tensor.
            kind: one of `KINDS`.
            values: number of values it represents; by default, its number of elements.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._held.get(key)
        if known is not None:
            reference, _, size, count = known
            self._free(key)
        else:
            reference = weakref.ref(storage, partial(self._free_of, key))
            size = -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
            count = tensor.numel()
        self._held[key] = reference, kind, size, count if values is None else values
        self._bytes[kind] += size
        self._values[kind] += self._held[key][3]
        self._total += size
        if self._total > self._highest:
            self._note()

    def mark(self, events: Iterable[Hashable]) -> None:
        """End an interval. Among intervals with the same event, the highest peak is kept."""
        for event in events:
            if event not in self.peaks or self._highest > total_bytes(self.peaks[event]):
                self.peaks[event] = self._peak
        self._note()

    def amounts(self) -> Amounts:
        """The amounts that are live now."""
        return {kind: (self._bytes[kind], self._values[kind]) for kind in KINDS}

    def _note(self, more: int = 0) -> None:
        self._highest = self._total + more
        self._peak = self.amounts()

    def _within(self, more: int) -> None:
        """Count bytes that are live only within a kernel."""
        if self._total + more > self._highest:
            self._note(more)
            size, values = self._peak[ACTIVATIONS]
            self._peak[ACTIVATIONS] = size + more, values

    def _free(self, key: int) -> None:
        _, kind, size, values = self._held.pop(key)
        self._bytes[kind] -= size
        self._values[kind] -= values
        self._total -= size

    def _free_of(self, key: int, reference: weakref.ref[Any]) -> None:
        if key in self._held and self._held[key][0] is reference:
            self._free(key)

    def _kind(self, func: Any, tensor: torch.Tensor) -> str:
        if func in _KINDS_OF_RESULTS:
            return _KINDS_OF_RESULTS[func]
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary and tensor.numel() == self._logits
        return LOGITS if is_logits else ACTIVATIONS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Int8Weight in types:  # its own dispatch calls operators on its parts
            return NotImplemented
        kwargs = kwargs or {}
        if func in _AS_ON_A_GPU:
            with self:
                return _AS_ON_A_GPU[func](*args, **kwargs)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return _value(args[0])
        result = self._shapes.run(func, args, kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self.hold(tensor, self._kind(func, tensor))
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            self._within(_flash_workspace(*args[1:4]))
        return result


def total_bytes(amounts: Amounts) -> int:
    return sum(size for size, _ in amounts.values())


class AsOnAGpu(TorchFunctionMode):
    """Selects attention kernels and, with autocast, the dtypes of functions as PyTorch does on CUDA.

    Args:
        autocast: whether autocast to bf16 is on, with the function lists of CUDA.
    """

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self._caching = False
        self._casts: dict[torch.Tensor, torch.Tensor] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run a forward pass, during which autocast caches its casts of parameters."""
        self._caching = True
        try:
            with self:
                yield
        finally:
            self._caching = False
            self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast and func in _IN_BF16:
            args, kwargs = self._cast(args, kwargs, torch.bfloat16)
        elif self.autocast and func in _IN_FP32:
            args, kwargs = self._cast(args, kwargs, torch.float32)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        return [self.cast(value, dtype) for value in args], {k: self.cast(v, dtype) for k, v in kwargs.items()}

    def cast(self, value: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, Int8Weight):  # is decoded to the dtype of the other operand
            return value
        if not (self._caching and isinstance(value, torch.nn.Parameter) and value.requires_grad):
            return value.to(dtype)
        if value not in self._casts:
            self._casts[value] = value.to(dtype)
        return self._casts[value]


_IN_BF16 = {
    F.linear, F.conv1d, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm, torch.addmm, torch.baddbmm, torch.Tensor.baddbmm,
    torch.einsum,
}  # fmt: skip
_IN_FP32 = {
    F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.Tensor.softmax, torch.pow, torch.Tensor.pow,
    torch.Tensor.__pow__, torch.rsqrt, torch.exp, torch.Tensor.exp, torch.cumsum, torch.Tensor.cumsum, torch.sum,
    torch.Tensor.sum,
}  # fmt: skip


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """CUDA's fused kernels where they apply, else the plain formula, which stores all scores."""
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    if attn_mask is None and half and width == value.shape[-1] <= 256 and width % 8 == 0:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if not enable_gqa and width % 8 == 0:
        efficient = aten._scaled_dot_product_efficient_attention
        mask = attn_mask
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype)
            mask = mask.expand(*query.shape[:3], key.shape[2])
        return efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]
    options: Any = {"scale": scale, "enable_gqa": enable_gqa}
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _flash_workspace(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Bytes of the workspace of FlashAttention 2 (Dao, 2023, arXiv 2307.08691) in backward.

    It holds the gradient of the queries in fp32 and, where heads share keys and values, their gradients per head.
    """
    batch, heads, tokens, width = query.shape
    rows = batch * heads * (-(-tokens // 128) * 128)
    shared = 2 * query.element_size() if key.shape[1] != heads else 0
    return rows * (-(-width // 32) * 32) * (4 + shared)


def _value(tensor: torch.Tensor) -> bool:
    """The answer when code reads a boolean: True, as for a batch without padding or packed sequences.

    Raises:
        NotImplementedError: the code reads another dtype.
    """
    if tensor.dtype == torch.bool:
        return True
    raise NotImplementedError("what the model computes depends on its activations")


def _linear(x: torch.Tensor, *packed: Any) -> torch.Tensor:
    return x @ ours.dequantize(*packed, x.dtype)


def _linear_grad_x(dy: torch.Tensor, *packed: Any) -> torch.Tensor:
    return dy @ ours.dequantize(*packed, dy.dtype).t()


def _linear_grad_scales(
    x: torch.Tensor, dy: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, *layout: Any
) -> torch.Tensor:
    _g_idx, _bits, group_size, _zero_offset = layout
    rows, columns = x.shape[-1], dy.shape[-1]
    x, dy = x.reshape(-1, rows), dy.reshape(-1, columns)
    tiles = -(-rows // min(group_size, _TILE_ROWS))
    sums = x.new_empty(tiles, columns, dtype=torch.float32)
    for first in range(0, rows, _PRODUCT_ROWS):
        product = x[:, first : first + _PRODUCT_ROWS].t() @ dy  # noqa: F841  each one lives until the next is computed
    return sums if tiles == len(qzeros) else sums.new_empty(len(qzeros), columns)


def _int8_linear(x: torch.Tensor, *weight_and_bias: Any) -> torch.Tensor:
    *weight, bias = weight_and_bias
    return F.linear(x, ours.decode_weight(*weight, x.dtype), bias)


def _int8_linear_grad_x(dy: torch.Tensor, *weight: Any) -> torch.Tensor:
    return dy @ ours.decode_weight(*weight, dy.dtype)


# what the Triton kernels of `ops/packed` and `ops/int8` allocate
_AS_ON_A_GPU = {
    ours.linear.default: _linear,
    ours.linear_grad_x.default: _linear_grad_x,
    ours.linear_grad_scales.default: _linear_grad_scales,
    ours.int8_linear.default: _int8_linear,
    ours.int8_linear_grad_x.default: _int8_linear_grad_x,
}
_KINDS_OF_RESULTS = {
    ours.dequantize.default: DECODED,
    ours.decode_weight.default: DECODED,
    ours.encode_gradient.default: GRADIENTS,
}
