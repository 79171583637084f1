"""Decoding in plain PyTorch, a block of rows at a time, so that intermediates stay in the CPU's cache.

A *unit* is the run of codes in 16 bits (12 at 3 bits). ORed into the bits of the float `2^(23 - i b)`, the code at bit
`i * b` of a unit gives the fp32 number `2^(23 - i b) + q`. So one `&` over units with all exponent bits set turns
every code into a float, and a second pass subtracts `2^(23 - i b) + z`, which is exact, and multiplies by the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .operators import PackedWeight
from .packing import unpack_zeros


# rows start on a multiple of 32 so that a block is whole words at every bit width
ROW_ALIGNMENT = 32

_EXPONENT_BITS = 0x7F800000
_UNIT_CODES = {2: 8, 3: 4, 4: 4, 8: 2}
_OFFSETS = {
    bits: torch.tensor([[2.0 ** (23 - i * bits)] for i in range(codes)]) for bits, codes in _UNIT_CODES.items()
}
_MASKS = {
    bits: offsets.view(torch.int32) | ((1 << bits) - 1) << bits * torch.arange(len(offsets)).int()[:, None]
    for bits, offsets in _OFFSETS.items()
}


@dataclass(frozen=True)
class Block:
    """Rows `[start, stop)` of the weight.

    `groups` is either a slice of the `G` groups, which divide the block's rows equally, or an int64 index
    `[stop - start]` with the group of each row.
    """

    start: int
    stop: int
    groups: slice | torch.Tensor


def blocks(weight: PackedWeight, target: int) -> Iterator[Block]:
    """Cut a weight into blocks of about `target` rows, each in whole words and, where possible, whole groups."""
    rows, group_size, g_idx = weight.rows, weight.group_size, weight.g_idx
    target = max(ROW_ALIGNMENT, target // ROW_ALIGNMENT * ROW_ALIGNMENT)
    if g_idx is None and group_size % ROW_ALIGNMENT and group_size < rows:
        g_idx = torch.arange(rows) // group_size
    if g_idx is not None:
        for start in range(0, rows, target):
            stop = min(start + target, rows)
            yield Block(start, stop, g_idx[start:stop].long())
        return
    whole_groups = target // group_size * group_size
    start = 0
    while start < rows:
        group = start // group_size
        stop = start + whole_groups if whole_groups else min(start + target, (group + 1) * group_size)
        if stop > rows:  # an incomplete last group becomes its own block
            full = (rows - start) // group_size * group_size
            stop = start + full if full else rows
        yield Block(start, stop, slice(group, group + max(1, (stop - start) // group_size)))
        start = stop


class Decoder:
    """Decodes blocks of one packed weight: `scales * (q - z)`."""

    def __init__(self, weight: PackedWeight) -> None:
        self._qweight, self._bits, self._columns = weight.qweight, weight.bits, weight.columns
        device = weight.qweight.device
        self._mask = _MASKS[weight.bits].to(device)
        zeros = unpack_zeros(weight.qzeros, weight.bits, weight.zero_offset)
        self._subtrahends = zeros.float().unsqueeze(1) + _OFFSETS[weight.bits].to(device)  # [G, codes of a unit, N]
        self._factors = weight.scales.float() * 0.5  # for the 2 in `mse_loss_backward`

    def decode(self, block: Block, out: torch.Tensor) -> torch.Tensor:
        """Decode a block into `out`, contiguous fp32 `[rows of the block, N]`; returns `out`."""
        units = self._units(self._qweight[block.start * self._bits // 32 : block.stop * self._bits // 32])
        codes = len(self._mask)
        torch.bitwise_and(units, self._mask, out=out.view(torch.int32).view(-1, codes, self._columns))
        if isinstance(block.groups, slice):
            subtrahends = self._subtrahends[block.groups].unsqueeze(1)
            factors = self._factors[block.groups, None, None]
        else:
            groups = block.groups.to(out.device)
            place = torch.arange(len(groups), device=out.device) % codes
            subtrahends = self._subtrahends.flatten(0, 1).index_select(0, groups * codes + place)
            factors = self._factors.index_select(0, groups)
            subtrahends, factors = (t.view(1, -1, codes, t.shape[-1]) for t in (subtrahends, factors))
        values = out.view(len(subtrahends), -1, codes, self._columns)
        # 2 * (values - subtrahends) * factors in one pass
        torch.ops.aten.mse_loss_backward.grad_input(factors, values, subtrahends, 0, grad_input=values)
        return out

    def _units(self, words: torch.Tensor) -> torch.Tensor:
        """The block's units, each with all exponent bits set, int32 `[units, 1, N]`."""
        if self._bits == 3:
            words = words.view(-1, 3, self._columns)
            units = words.new_empty(len(words), 8, self._columns)
            for i in range(8):
                word, shift = divmod(12 * i, 32)
                torch.bitwise_right_shift(words[:, word], shift, out=units[:, i])
                if shift > 20:
                    low_bits = 32 - shift
                    units[:, i].bitwise_and_((1 << low_bits) - 1).bitwise_or_(words[:, word + 1] << low_bits)
            units.bitwise_or_(_EXPONENT_BITS)
        else:
            units = words.new_empty(len(words), 2, self._columns)
            torch.bitwise_or(words, _EXPONENT_BITS, out=units[:, 0])
            torch.bitwise_right_shift(words, 16, out=units[:, 1]).bitwise_or_(_EXPONENT_BITS)
        return units.view(-1, 1, self._columns)
