"""The packed product of few tokens on the CPU, by PyTorch's kernels, from a table kept beside the packed codes.

PyTorch's embedding bag over 8-bit rows takes the rows of a group as a bag, weighted by the token: `bags[g, n] = sum
over k in group g of x[k] * (q - z)[k, n]`, and `y[n] = sum over g of scales[g, n] * bags[g, n]`, all in fp32. The
table takes one byte per weight. For symmetric 4-bit weights and tokens in bfloat16 there is a dedicated kernel, which
rounds scales and weights to bfloat16 and accumulates in fp32; its table takes half a byte per weight. Neither table
contains the scales, so they can be trained.

A table is built at the first product of few tokens with a `qweight` and lives as long as that tensor. It is rebuilt
when the packed tensors are replaced or written to, except through `.data` or NumPy, which PyTorch does not track.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from .operators import PackedWeight
from .packing import unpack_rows, unpack_zeros


_MAX_TOKENS = 8
_HAS_KERNEL = "fbgemm" in torch.backends.quantized.supported_engines

# supported by `_weight_int4pack_mm_for_cpu`
_INT4_GROUP_SIZES = (32, 64, 128, 256)
_INT4_COLUMNS = 16
_INT4_ZERO_POINT = 8
# rows per bag if all rows share one group: the kernel's threads divide the bags among them
_BAG_ROWS = 128


class _State:
    """Identity and version of a tensor's data, to detect changes without reading it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # as long as it is referenced, no other storage gets its address
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = _layout(tensor)

    def is_of(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata == self._storage.cdata and _layout(tensor) == self._layout


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


_Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of tokens `[M, K]` and scales `[G, N]` that multiplies with the weight's table."""


@dataclass(frozen=True)
class _Table:
    """`product` is None if no table can hold the weight."""

    made_from: list[_State]
    arguments: tuple[object, ...]
    product: _Product | None


_tables = WeakIdKeyDictionary()


def linear(tokens: torch.Tensor, weight: PackedWeight) -> torch.Tensor | None:
    """`tokens @ W`: `[M, K]` -> `[M, N]`, in fp32 unless the bfloat16 kernel computes it.

    Returns None for no tokens or more than 8, and if a table cannot hold the weight or be kept up to date: 8-bit codes
    whose zero points differ, tensors made in inference mode, no kernel for this CPU.
    """
    packed = [tensor for tensor in (weight.qweight, weight.qzeros, weight.g_idx) if tensor is not None]
    if not 0 < len(tokens) <= _MAX_TOKENS or not _HAS_KERNEL or any(tensor.is_inference() for tensor in packed):
        return None
    bfloat16 = tokens.dtype == torch.bfloat16
    arguments = (weight.bits, weight.group_size, weight.zero_offset, weight.g_idx is None, bfloat16)
    table = _tables.get(weight.qweight)
    if table is None or table.arguments != arguments or not all(map(_State.is_of, table.made_from, packed)):
        made_from = [_State(tensor) for tensor in packed]
        table = _tables[weight.qweight] = _Table(made_from, arguments, _make_product(bfloat16, weight))
    return table.product and table.product(tokens, weight.scales)


def _make_product(bfloat16: bool, weight: PackedWeight) -> _Product | None:
    qweight, qzeros, _, g_idx, bits, group_size, zero_offset = weight
    codes, zeros = unpack_rows(qweight, bits), unpack_zeros(qzeros, bits, zero_offset)
    if bfloat16 and _is_int4(codes, zeros, g_idx, bits, group_size):
        return _int4_product(codes, group_size)
    return _bags_product(codes, zeros, g_idx, bits, group_size)


def _is_int4(codes: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, bits: int, group_size: int) -> bool:
    whole = len(codes) % group_size == 0 and codes.shape[1] % _INT4_COLUMNS == 0
    grouped = g_idx is None and bits == 4 and group_size in _INT4_GROUP_SIZES
    return whole and grouped and bool((zeros == _INT4_ZERO_POINT).all())


def _int4_product(codes: torch.Tensor, group_size: int) -> _Product:
    table = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().int().contiguous(), 1)
    last: tuple[_State | None, torch.Tensor] = (None, torch.empty(0))

    def product(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        nonlocal last
        made_from, scales_and_offsets = last
        if scales.is_inference() or made_from is None or not made_from.is_of(scales):
            made_from = None if scales.is_inference() else _State(scales)
            scales_and_offsets = tokens.new_zeros(*scales.shape, 2)
            scales_and_offsets[..., 0] = scales
            last = made_from, scales_and_offsets
        return torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, table, group_size, scales_and_offsets)

    return product


def _bags_product(
    codes: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, bits: int, group_size: int
) -> _Product | None:
    groups = torch.arange(len(codes)) // group_size if g_idx is None else g_idx.long()
    bag_of_row = groups if len(zeros) > 1 else torch.arange(len(codes)) // _BAG_ROWS
    sorted_bags, order = bag_of_row.sort(stable=True)
    bag_count = max(len(zeros), int(sorted_bags[-1]) + 1)
    offsets = torch.searchsorted(sorted_bags, torch.arange(bag_count + 1)).int()
    bias = -(1 << bits)
    if bits < 8:
        codes -= (zeros + bias)[groups]
    else:
        low, high = (int(zero) for zero in zeros.aminmax())
        if low != high:
            return None
        bias = -low
    scale_and_bias = torch.tensor([1.0, bias]).view(torch.uint8)
    table = torch.cat([codes, scale_and_bias.expand(len(codes), -1)], 1)
    in_order, order = g_idx is None, order.int()

    def product(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        tokens, scales = tokens.float(), scales.float()
        if not in_order:
            tokens = tokens[:, order]
        sums = [
            torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                table, order, offsets, per_sample_weights=token, include_last_offset=True
            )
            for token in tokens
        ]
        return torch.stack([_scaled_sum(bags, scales) for bags in sums])

    return product


def _scaled_sum(bags: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`[bags, N]` -> `[N]`."""
    return bags.sum(0).mul_(scales[0]) if len(scales) == 1 else bags.mul_(scales).sum(0)
