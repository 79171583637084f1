"""Packing of GPTQ integers into 32-bit words.

GPTQ stores `b`-bit codes (`b` in 2, 3, 4, 8) as one little-endian bitstream: code `i` occupies the bits
`[i * b, (i + 1) * b)` of the stream, which is cut into int32 words. `qweight` holds one stream per output channel,
running down the rows; `qzeros` holds one stream per group, running along the columns. The 3-bit layout, in which codes
10 and 21 of every 32 straddle two words, is this same bitstream.

Zero points come in two formats. `gptq_v2` stores the zero point itself. `gptq` (v1) stores it minus one: for 2, 4 and
8 bits the subtraction was done on whole words, so that a zero point of 0 borrows from its neighbour, and decoding has
to add to whole words as well; for 3 bits every field wraps on its own.
"""

from __future__ import annotations

import torch


SUPPORTED_BITS = (2, 3, 4, 8)
WORD_BITS = 32

_ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def words_for(codes: int, bits: int) -> int:
    """Number of 32-bit words that hold `codes` codes of `bits` bits.

    Raises:
        ValueError: if the codes do not fill whole words, which the GPTQ format does not allow.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"GPTQ packs 2, 3, 4 or 8 bits, got {bits}.")
    if codes * bits % WORD_BITS:
        raise ValueError(f"{codes} codes of {bits} bits do not fill whole {WORD_BITS}-bit words.")
    return codes * bits // WORD_BITS


def unpack_rows(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack words along the first dimension: int32 `[K * bits / 32, N]` -> uint8 codes `[K, N]`."""
    columns = packed.shape[1]
    if bits == 3:
        return _unpack_3_bits(packed).view(-1, columns)
    octets = packed.reshape(-1).view(torch.uint8).view(-1, columns, 4).transpose(1, 2).contiguous()
    if bits == 8:
        return octets.view(-1, columns)
    codes = octets.new_empty(octets.shape[0], 4, 8 // bits, columns)
    for i in range(8 // bits):
        torch.bitwise_and(octets >> (i * bits), (1 << bits) - 1, out=codes[:, :, i])
    return codes.view(-1, columns)


def _unpack_3_bits(packed: torch.Tensor) -> torch.Tensor:
    words = packed.view(-1, 3, packed.shape[1])
    codes = words.new_empty(words.shape[0], 32, packed.shape[1], dtype=torch.uint8)
    for i in range(32):
        word, shift = divmod(i * 3, WORD_BITS)
        code = words[:, word] >> shift
        if shift > WORD_BITS - 3:
            low_bits = WORD_BITS - shift
            code = (code & ((1 << low_bits) - 1)) | (words[:, word + 1] << low_bits)
        codes[:, i] = code & 7
    return codes


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes `[K, N]` along the first dimension into int32 words `[K * bits / 32, N]`."""
    words_for(codes.shape[0], bits)
    period_words = 3 if bits == 3 else 1  # the shortest run of whole words that holds whole codes
    period_codes = period_words * WORD_BITS // bits
    fields = (codes.to(torch.int64) & ((1 << bits) - 1)).view(-1, period_codes, codes.shape[1])
    words = fields.new_zeros(fields.shape[0], period_words, codes.shape[1])
    for i in range(period_codes):
        word, shift = divmod(i * bits, WORD_BITS)
        words[:, word] |= fields[:, i] << shift
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= fields[:, i] >> (WORD_BITS - shift)
    return words.to(torch.int32).view(-1, codes.shape[1])


def unpack_zeros(qzeros: torch.Tensor, bits: int, zero_offset: int) -> torch.Tensor:
    """Decode packed zero points: int32 `[G, N * bits / 32]` -> uint8 `[G, N]`.

    Args:
        zero_offset: amount the format subtracted from the zero points: 1 for `gptq` (v1), 0 for `gptq_v2`.
    """
    if bits == 3:
        zeros = unpack_rows(qzeros.t().contiguous(), bits).t().contiguous()
        return (zeros + 1) & 7 if zero_offset else zeros
    if zero_offset:
        qzeros = qzeros + _ONE_IN_EVERY_FIELD[bits]
    # a clone, since `contiguous` keeps any stride of a dimension of size 1
    octets = qzeros.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    zeros = octets.new_empty(*octets.shape, 8 // bits)
    for i in range(8 // bits):
        zeros[..., i] = (octets >> (i * bits)) & ((1 << bits) - 1)
    return zeros.flatten(1)


def pack_zeros(zeros: torch.Tensor, bits: int, zero_offset: int) -> torch.Tensor:
    """Encode zero points `[G, N]` as int32 `[G, N * bits / 32]`: the inverse of [`unpack_zeros`]."""
    if zero_offset and bits == 3:
        zeros = zeros - 1
    qzeros = pack_rows(zeros.t(), bits).t().contiguous()
    if zero_offset and bits != 3:
        qzeros = qzeros - _ONE_IN_EVERY_FIELD[bits]
    return qzeros


def convert_zeros(qzeros: torch.Tensor, bits: int, source_offset: int, target_offset: int) -> torch.Tensor:
    """Re-encode packed zero points from one format to the other; exact in both directions."""
    if source_offset == target_offset:
        return qzeros
    if bits == 3:
        return pack_zeros(unpack_zeros(qzeros, bits, source_offset), bits, target_offset)
    return qzeros + (source_offset - target_offset) * _ONE_IN_EVERY_FIELD[bits]
