"""An int8 weight that can be used as a parameter: `nn.Parameter(Int8Weight.from_dense(weight))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map_only

from .. import ops


aten = torch.ops.aten
_PARTS = ("codes", "scales", "outlier_columns", "outlier_values")
_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Int8Weight(torch.Tensor):
    """A weight `[N, K]` held as int8 codes, fp32 scales and a fixed number of outliers per row.

        weight[n, k] = codes[n, k] * scales[n, k // g]  (+ the outlier's value, if there is one)

    Its nominal dtype is floating point, and it decodes to that dtype. `F.linear` and `F.embedding` decode it and keep
    nothing dense for backward; its gradient is a dense tensor. Rows can be split, copied and stored without decoding.
    Every other operation runs on the decoded weight, and in-place operations encode the result to nearest. Assigning
    to `data` encodes too; the number of rows may change, and unchanged rows keep their codes: transformers resizes
    embeddings this way.

    Attributes:
        codes: int8 `[N, K]`.
        scales: fp32 `[N, G]`, one per group of `g = K / G` weights in a row; not zero, of either sign.
        outlier_columns: int16 (int32 if K > 32768) `[N, R]`, ascending in each row; None without outliers.
        outlier_values: fp32 `[N, R]`, or None.
        flat: whether it is the flat view `[N * K]` of a weight.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    outlier_columns: torch.Tensor | None
    outlier_values: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        outlier_columns: torch.Tensor | None,
        outlier_values: torch.Tensor | None,
        dtype: torch.dtype,
        flat: bool = False,
    ) -> Int8Weight:
        size = (codes.numel(),) if flat else codes.shape
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=codes.device)

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        outlier_columns: torch.Tensor | None,
        outlier_values: torch.Tensor | None,
        dtype: torch.dtype,
        flat: bool = False,
    ) -> None:
        self.codes = codes
        self.scales = scales
        self.outlier_columns = outlier_columns
        self.outlier_values = outlier_values
        self.flat = flat

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, outlier_ratio: float = 0.01, dtype: torch.dtype | None = None
    ) -> Int8Weight:
        """Encode a floating point weight `[N, K]`, to nearest.

        Args:
            weight: the weight.
            outlier_ratio: share of each row's weights, the largest ones, that are kept in fp32.
            dtype: the nominal dtype, used for computation; that of `weight` by default.

        Raises:
            ValueError: `weight` is not a matrix or not finite, or the ratio is not in `[0, 1)`.
        """
        if weight.dim() != 2:
            raise ValueError(f"An int8 weight is a matrix, found the shape {tuple(weight.shape)}: keep it in 16 bits.")
        if not 0 <= outlier_ratio < 1:
            raise ValueError(f"outlier_ratio is a share in [0, 1), found {outlier_ratio}. The usual one is 0.01.")
        weight = weight.detach().contiguous()
        if not weight.isfinite().all():
            raise ValueError("The weight has infinite or NaN elements, which int8 cannot hold: repair the checkpoint.")
        outliers = round(outlier_ratio * weight.shape[1])
        return cls(*ops.encode_weight(weight, outliers), dtype or weight.dtype)

    @classmethod
    def from_parts(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        outlier_columns: torch.Tensor | None = None,
        outlier_values: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Int8Weight:
        """Create a weight from its parts; see the class for shapes and dtypes.

        Raises:
            ValueError: shapes or dtypes do not fit, scales are zero or not finite, values are not finite, or
                outliers lie outside the row.
        """
        _check(codes, scales, outlier_columns, outlier_values)
        return cls(codes.contiguous(), scales.contiguous(), outlier_columns, outlier_values, dtype)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors it consists of, by attribute name."""
        return {name: part for name in _PARTS if (part := getattr(self, name)) is not None}

    @property
    def bytes_held(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight, detached, in `dtype` (by default the nominal dtype)."""
        return ops.decode_weight(self._tensors(), dtype or self.dtype).view(self.shape)

    @torch.no_grad()
    def refresh(self, key: int) -> None:
        """Recompute outliers, and scales of groups whose codes reach the edge or use less than half of their range.

        In place; the key (`ops.random_key`) seeds the stochastic rounding. Weights whose scale stays keep their codes.
        """
        ops.refresh_weight(self._tensors(), key)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], torch.dtype]:
        return tuple(self.parts.values()), self.dtype

    def fsdp_post_all_gather(
        self,
        gathered: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        param_dtype: torch.dtype | None,
        *,
        out: Int8Weight | None = None,
    ) -> tuple[Int8Weight, tuple[torch.Tensor, ...]] | None:
        if out is not None:  # already shares memory with the gathered tensors
            return None
        return Int8Weight.__tensor_unflatten__(dict(zip(self.parts, gathered)), (dtype, False)), gathered

    def _tensors(self) -> ops.EncodedWeight:
        return ops.EncodedWeight(self.codes, self.scales, self.outlier_columns, self.outlier_values)

    def _write(self, codes: torch.Tensor, scales: torch.Tensor, *outliers: torch.Tensor | None) -> None:
        for part, new in zip(self._tensors(), (codes, scales, *outliers)):
            if part is not None and new is not None:
                part.copy_(new)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> Int8Weight:
        tensors: Any = (None if part is None else function(part) for part in self._tensors())
        return Int8Weight(*(*tensors, dtype or self.dtype, self.flat))

    def _encoded_like(self, dense: torch.Tensor) -> Int8Weight:
        """Encode a dense weight of any number of rows, with the same groups and outliers; equal rows stay."""
        dense = dense.detach()
        if dense.dim() != 2 or dense.shape[1] != self.codes.shape[1]:
            raise ValueError(
                f"The data of an int8 weight {tuple(self.codes.shape)} has {self.codes.shape[1]} columns, found "
                f"{tuple(dense.shape)}: use `Int8Weight.from_dense`, and make it another parameter."
            )
        outliers = 0 if self.outlier_columns is None else self.outlier_columns.shape[1]
        encoded = Int8Weight(*ops.encode_weight(dense, outliers, self.scales.shape[1]), dense.dtype)
        rows = min(len(dense), len(self.codes))
        before = self._map(lambda part: part[:rows].to(dense.device))
        same = (dense[:rows] == before.dequantize(dense.dtype)).all(1)
        for old, new in zip(before.parts.values(), encoded.parts.values()):
            new[:rows][same] = old[same]
        return encoded

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        return list(self.parts), (self.dtype, self.flat)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], nominal: tuple[torch.dtype, bool], size: Any = None, stride: Any = None
    ) -> Int8Weight:
        tensors: Any = (parts.get(name) for name in _PARTS)
        return Int8Weight(*(*tensors, *nominal))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        outliers = 0 if self.outlier_columns is None else self.outlier_columns.shape[1]
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"groups={self.scales.shape[1]}, outliers={outliers}, requires_grad={self.requires_grad})"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == _SET_DATA:
            return _set_data(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _IMPLEMENTED:
            return _IMPLEMENTED[func](func, *args, **kwargs)
        dense_args, dense_kwargs = tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
        result = func(*dense_args, **dense_kwargs)
        for argument, given, dense in zip(func._schema.arguments, args, dense_args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = zip(given, dense) if isinstance(given, (list, tuple)) else ((given, dense),)
                for weight, value in written:
                    if isinstance(weight, Int8Weight):
                        weight.copy_(value)
                        result = weight if result is value else result
        return result


def _set_data(weight: torch.Tensor, data: torch.Tensor) -> None:
    if isinstance(weight, Int8Weight):
        if not isinstance(data, Int8Weight):
            data = weight._encoded_like(data)
        for name, part in zip(_PARTS, data._tensors()):
            setattr(weight, name, part)
        weight.flat = data.flat
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(weight, data)


def _copy(func: Any, target: Any, source: Any, non_blocking: bool = False) -> torch.Tensor:
    if not isinstance(target, Int8Weight):
        return func(target, source.dequantize(), non_blocking)
    if isinstance(source, Int8Weight) and _layout(source) == _layout(target):
        target._write(*source._tensors())
        return target
    dense = source.dequantize(torch.float32) if isinstance(source, Int8Weight) else source
    outliers = 0 if target.outlier_columns is None else target.outlier_columns.shape[1]
    dense = dense.to(target.device).expand_as(target).reshape(target.codes.shape)
    target._write(*ops.encode_weight(dense, outliers, target.scales.shape[1]))
    return target


def _layout(weight: Int8Weight) -> dict[str, torch.Size]:
    return {"weight": weight.shape, **{name: part.shape for name, part in weight.parts.items()}}


def _to_copy(func: Any, weight: Int8Weight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    """Only the nominal dtype changes; codes and scales keep theirs."""
    if dtype is not None and not dtype.is_floating_point:
        return func(weight.dequantize(), dtype=dtype, **kwargs)
    return weight._map(lambda part: func(part, **kwargs), dtype)


def _map_parts(func: Any, weight: Int8Weight, *args: Any, **kwargs: Any) -> Int8Weight:
    return weight._map(lambda part: func(part, *args, **kwargs))


def _slice(func: Any, weight: Int8Weight, dim: int = 0, *args: Any) -> torch.Tensor:
    if dim != 0 or weight.flat:
        return func(weight.dequantize(), dim, *args)
    return weight._map(lambda part: func(part, dim, *args))


def _split(func: Any, weight: Int8Weight, size: int, dim: int = 0) -> Any:
    if dim != 0 or weight.flat:
        return func(weight.dequantize(), size, dim)
    pieces = zip(*(func(part, size) for part in weight.parts.values()))
    return [Int8Weight.__tensor_unflatten__(dict(zip(weight.parts, parts)), (weight.dtype, False)) for parts in pieces]


def _new_zeros(func: Any, weight: Int8Weight, size: Any, **kwargs: Any) -> torch.Tensor:
    """Zeros in int8, to be overwritten; a dense tensor if the width or dtype differs."""
    if weight.flat or len(size) != 2 or size[1] != weight.shape[1] or kwargs.get("dtype") not in (None, weight.dtype):
        return torch.zeros(size, **{"dtype": weight.dtype, "device": weight.device, **kwargs})
    kwargs.pop("dtype", None)
    return weight._map(lambda part: func(part, (size[0], part.shape[1]), **kwargs))


def _view(func: Any, weight: Int8Weight, size: Any) -> torch.Tensor:
    flat = tuple(size) in ((-1,), (weight.numel(),))
    if flat or tuple(size) == tuple(weight.codes.shape):
        return Int8Weight(*weight._tensors(), weight.dtype, flat)
    return func(weight.dequantize(), size)


def _as_strided(func: Any, weight: Int8Weight, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    if tuple(size) == tuple(weight.shape) and tuple(stride) == weight.stride() and not offset:
        return weight._map(lambda part: part.view(part.shape))
    return func(weight.dequantize(), size, stride, offset)


def _embedding(func: Any, weight: Any, indices: torch.Tensor, *args: Any) -> torch.Tensor:
    if weight.flat:
        return func(weight.dequantize(), indices, *args)
    rows = indices.reshape(-1)
    found = weight._map(lambda part: part.index_select(0, rows)).dequantize()
    return found.view(*indices.shape, weight.shape[1])


_IMPLEMENTED: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _map_parts,
    aten.alias.default: _map_parts,
    aten.clone.default: _map_parts,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.embedding.default: _embedding,
    # used by FSDP2 to shard
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
}


# Dynamo would trace into the autograd Function, and before PyTorch 2.13 checkpointing would not recompute it
@torch.compiler.allow_in_graph
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, Int8Weight) or weight.flat:
        raise TypeError("F.linear takes an int8 weight [N, K] as its weight: pass the `dequantize()` of any other.")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return ops.Int8LinearFunction.apply(x, weight, weight._tensors(), bias)


def _check(
    codes: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor | None, values: torch.Tensor | None
) -> None:
    rows, width = codes.shape if codes.dim() == 2 else (0, 0)
    if codes.dtype != torch.int8 or not width:
        raise ValueError(f"codes are an int8 matrix, found {codes.dtype} {tuple(codes.shape)}.")
    if scales.dtype != torch.float32 or scales.dim() != 2 or len(scales) != rows or width % max(scales.shape[1], 1):
        raise ValueError(
            f"scales are fp32 [{rows}, G] with G a divisor of {width}, found {scales.dtype} {tuple(scales.shape)}. "
            "Encode the decoded weight (`from_dense`) if its groups do not divide a row."
        )
    if not (scales.isfinite() & (scales != 0)).all():
        raise ValueError("scales are finite and not zero, but some are not: the checkpoint is damaged.")
    if (columns is None) != (values is None):
        raise ValueError("outlier_columns and outlier_values come together: pass both, or neither.")
    if columns is None or values is None:
        return
    dtype = torch.int16 if width <= 1 << 15 else torch.int32
    if columns.dtype != dtype or columns.dim() != 2 or len(columns) != rows:
        raise ValueError(f"outlier_columns are {dtype} [{rows}, R], found {columns.dtype} {tuple(columns.shape)}.")
    if values.dtype != torch.float32 or values.shape != columns.shape or not values.isfinite().all():
        raise ValueError(f"outlier_values are finite fp32 {tuple(columns.shape)}, as the columns; these are not.")
    if (columns < 0).any() or (columns >= width).any() or (columns[:, 1:] <= columns[:, :-1]).any():
        raise ValueError(f"outlier_columns ascend within 0 to {width - 1} in each row, but some do not.")


torch.serialization.add_safe_globals([Int8Weight])
