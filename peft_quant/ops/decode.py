"""Decoding in plain PyTorch, a block of rows at a time, so that what is in flight stays in the CPU's cache.

A *unit* is the run of codes that lies in 16 bits (12 at 3 bits). Among the bits of the float 2^23, the code at bit
`i * b` of a unit makes the fp32 number `2^23 + q * 2^(i b)`. So one pass of `&` over the units makes floats of all
codes, and a second one subtracts `2^23 + z * 2^(i b)`, which is exact, and multiplies by `scale / 2^(i b)`, which
rounds as `scale * (q - z)` does (but for scales below 2^-110).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .packing import unpack_zeros


# rows start on a multiple of 32 so that a block is whole words at every bit width
ROW_ALIGNMENT = 32

_FLOAT_2_23 = 0x4B000000
_UNIT_CODES = {2: 8, 3: 4, 4: 4, 8: 2}
_MASKS = {
    bits: torch.tensor([[_FLOAT_2_23 | ((1 << bits) - 1) << (i * bits)] for i in range(codes)], dtype=torch.int32)
    for bits, codes in _UNIT_CODES.items()
}
_PLACES = {bits: torch.tensor([[2.0 ** (i * bits)] for i in range(codes)]) for bits, codes in _UNIT_CODES.items()}


@dataclass(frozen=True)
class Block:
    """Rows `[start, stop)` of the weight. `groups` is a slice of `[G, N]` whose rows each cover an equal run of the
    block's rows, or an int64 index `[stop - start]` of one group a row."""

    start: int
    stop: int
    groups: slice | torch.Tensor


def blocks(rows: int, target: int, group_size: int, g_idx: torch.Tensor | None) -> Iterator[Block]:
    """Cut `rows` rows into blocks of about `target` rows, each in whole words and, where possible, whole groups."""
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
        if stop > rows:  # the last block: the ragged group at its end is a block of its own
            full = (rows - start) // group_size * group_size
            stop = start + full if full else rows
        yield Block(start, stop, slice(group, group + max(1, (stop - start) // group_size)))
        start = stop


class Decoder:
    """Decodes blocks of one packed weight: `scales * (q - z)`, or `q - z` where `scales` is None."""

    def __init__(
        self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor | None, bits: int, zero_offset: int
    ) -> None:
        self.qweight = qweight
        self.bits = bits
        self.rows, self.columns = qweight.shape[0] * 32 // bits, qweight.shape[1]
        self._mask = _MASKS[bits].to(qweight.device)
        places = _PLACES[bits].to(qweight.device)
        zeros = unpack_zeros(qzeros, bits, zero_offset)
        self._subtrahends = (zeros.float().unsqueeze(1) * places).add_(2.0**23)  # [G, codes of a unit, N]
        factors = 0.5 / places  # one half for the factor of 2 in `mse_loss_backward`
        if scales is None:
            self._factors = factors.expand(len(zeros), -1, 1)
        else:
            self._factors = scales.float().unsqueeze(1) * factors

    def decode(self, block: Block, out: torch.Tensor) -> torch.Tensor:
        """Write a block to `out`, fp32 `[rows of the block, N]` and contiguous; returns `out`."""
        units = self._units(self.qweight[block.start * self.bits // 32 : block.stop * self.bits // 32])
        codes = len(self._mask)
        torch.bitwise_and(units, self._mask, out=out.view(torch.int32).view(-1, codes, self.columns))
        if isinstance(block.groups, slice):
            subtrahends, factors = (t[block.groups].unsqueeze(1) for t in (self._subtrahends, self._factors))
        else:
            place = torch.arange(block.stop - block.start, device=out.device) % codes
            index = block.groups.to(out.device) * codes + place
            subtrahends, factors = (
                t.reshape(-1, t.shape[-1])[index].view(1, -1, codes, t.shape[-1])
                for t in (self._subtrahends, self._factors)
            )
        values = out.view(len(subtrahends), -1, codes, self.columns)
        # 2 * (values - subtrahends) * factors in one pass
        torch.ops.aten.mse_loss_backward.grad_input(factors, values, subtrahends, 0, grad_input=values)
        return out

    def _units(self, words: torch.Tensor) -> torch.Tensor:
        """The block's units, each with the bits of 2^23 set, int32 `[units, 1, N]`."""
        if self.bits == 3:
            words = words.view(-1, 3, self.columns)
            units = words.new_empty(len(words), 8, self.columns)
            for i in range(8):
                word, shift = divmod(12 * i, 32)
                torch.bitwise_right_shift(words[:, word], shift, out=units[:, i])
                if shift > 20:
                    low_bits = 32 - shift
                    units[:, i].bitwise_and_((1 << low_bits) - 1).bitwise_or_(words[:, word + 1] << low_bits)
            units.bitwise_or_(_FLOAT_2_23)
        else:
            units = words.new_empty(len(words), 2, self.columns)
            torch.bitwise_or(words, _FLOAT_2_23, out=units[:, 0])
            torch.bitwise_right_shift(words, 16, out=units[:, 1]).bitwise_or_(_FLOAT_2_23)
        return units.view(-1, 1, self.columns)
