"""The packed product of few tokens on the CPU, by PyTorch's embedding bag over 8-bit rows.

The rows of a group are a bag, weighted by the token: `bags[g, n] = sum over k in group g of x[k] * (q - z)[k, n]`, and
`y[n] = sum over g of scales[g, n] * bags[g, n]`, all in fp32. Scales are no part of the table, so they may train.

A table takes a byte a weight beside the packed codes. It is made at the first product of few tokens with a `qweight`
and lives as long as that tensor. It is made again when the packed tensors get other data or are written to, except
through `.data` or NumPy, which PyTorch does not count as writing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from .packing import unpack_rows, unpack_zeros


MAX_TOKENS = 8

_HAS_KERNEL = "fbgemm" in torch.backends.quantized.supported_engines
# rows of a bag where all share one group: bags are what the kernel's threads divide
_BAG_ROWS = 128


class _State:
    """What a tensor holds, as far as it can be told without reading it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._layout = (tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _State) and (self._storage, self._layout) == (other._storage, other._layout)


@dataclass(frozen=True)
class _Table:
    """`rows`: uint8 `[K, N + 8]`, `q - z` less the bias that ends each row, or None if that does not fit. `order`:
    int32 `[K]`, the rows bag by bag. `offsets`: int32 `[bags + 1]`, where each bag starts in it and the last ends."""

    made_from: tuple[object, ...]
    rows: torch.Tensor | None
    order: torch.Tensor
    offsets: torch.Tensor


_tables = WeakIdKeyDictionary()


def product(
    tokens: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> torch.Tensor | None:
    """`tokens @ W`: fp32 `[M, K]` -> fp32 `[M, N]`.

    None where a table cannot hold the weight or be kept up to date: codes of 8 bits whose zero points differ, tensors
    made in inference mode, no kernel for this CPU.
    """
    packed = [tensor for tensor in (qweight, qzeros, g_idx) if tensor is not None]
    if not _HAS_KERNEL or any(tensor.is_inference() for tensor in packed):
        return None
    made_from = (*(_State(tensor) for tensor in packed), bits, group_size, zero_offset)
    table = _tables.get(qweight)
    if table is None or table.made_from != made_from:
        table = _make_table(made_from, qweight, qzeros, g_idx, bits, group_size, zero_offset)
        _tables[qweight] = table
    if table.rows is None:
        return None
    if g_idx is not None:
        tokens = tokens[:, table.order]
    scales = scales.float()
    return torch.stack([_scaled_sum(_bags(token, table), scales) for token in tokens])


def _bags(token: torch.Tensor, table: _Table) -> torch.Tensor:
    """`[K]` -> `[bags, N]`."""
    return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table.rows, table.order, table.offsets, per_sample_weights=token, include_last_offset=True
    )


def _scaled_sum(bags: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return bags.sum(0).mul_(scales[0]) if len(scales) == 1 else bags.mul_(scales).sum(0)


def _make_table(
    made_from: tuple[object, ...],
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> _Table:
    codes = unpack_rows(qweight, bits)
    groups = torch.arange(len(codes)) // group_size if g_idx is None else g_idx.long()
    zeros = unpack_zeros(qzeros, bits, zero_offset)
    bag_of_row = groups if len(zeros) > 1 else torch.arange(len(codes)) // _BAG_ROWS
    sorted_bags, order = bag_of_row.sort(stable=True)
    bag_count = max(len(zeros), int(sorted_bags[-1]) + 1)
    offsets = torch.searchsorted(sorted_bags, torch.arange(bag_count + 1))
    bias = -(1 << bits)
    fits = True
    if bits < 8:
        codes -= (zeros + bias)[groups]
    else:
        low, high = (int(zero) for zero in zeros.aminmax())
        bias, fits = -low, low == high
    rows = None
    if fits:
        scale_and_bias = torch.tensor([1.0, bias]).view(torch.uint8)
        rows = torch.cat([codes, scale_and_bias.expand(len(codes), -1)], 1)
    return _Table(made_from, rows, order.int(), offsets.int())
