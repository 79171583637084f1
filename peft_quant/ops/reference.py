"""The arithmetic in naive fp32, one formula per function, to be checked line by line. Slow on purpose.

Symbols: `M` tokens, `K` in-features, `N` out-features, `G` groups, `b` bits. A packed weight decodes to

    W[k, n] = scales[g(k), n] * (q[k, n] - z[g(k), n])          (GPTQ)

and PEQA (Kim et al., 2023, arXiv 2305.14152) trains `scales` alone, so that dW/dscales = q - z.
"""

from __future__ import annotations

import torch


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words `[K * b / 32, N]` -> int64 codes `[K, N]`, one bit of the little-endian stream at a time."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    stream = torch.stack([(words >> i) & 1 for i in range(32)], dim=1).flatten(0, 1)
    per_code = stream.view(-1, bits, packed.shape[1])
    return torch.stack([per_code[:, i] << i for i in range(bits)]).sum(0)


def zeros(qzeros: torch.Tensor, bits: int, zero_offset: int) -> torch.Tensor:
    """int32 words `[G, N * b / 32]` -> int64 zero points `[G, N]`; v1 (`zero_offset=1`) borrows across a word."""
    if zero_offset and bits != 3:
        one_in_every_field = sum(1 << i for i in range(0, 32, bits))
        qzeros = ((qzeros.to(torch.int64) & 0xFFFFFFFF) + one_in_every_field) & 0xFFFFFFFF
    decoded = unpack(qzeros.t(), bits).t()
    return (decoded + 1) % 8 if zero_offset and bits == 3 else decoded


def centered_codes(
    qweight: torch.Tensor, qzeros: torch.Tensor, g_idx: torch.Tensor, bits: int, zero_offset: int
) -> torch.Tensor:
    """`q - z`, fp32 `[K, N]`."""
    return (unpack(qweight, bits) - zeros(qzeros, bits, zero_offset)[g_idx.long()]).float()


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    zero_offset: int,
) -> torch.Tensor:
    """`W`, fp32 `[K, N]`."""
    return scales.float()[g_idx.long()] * centered_codes(qweight, qzeros, g_idx, bits, zero_offset)


def round_scales(scales: torch.Tensor, base: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """Tuned scales as a checkpoint stores them: none crosses zero, and where `base` is negative so is the result."""
    info = torch.finfo(storage)
    smallest = info.smallest_normal * info.eps
    above = scales.clamp(smallest, info.max)
    below = scales.clamp(-info.max, -smallest)
    return torch.where(base > 0, above, below).to(storage)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`y = x @ W`: `[M, K]` times `[K, N]`."""
    return x.float() @ weight


def linear_grad_x(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`dx = dy @ W^T`: `[M, K]`."""
    return dy.float() @ weight.t()


def linear_grad_scales(
    x: torch.Tensor, dy: torch.Tensor, centered: torch.Tensor, g_idx: torch.Tensor, groups: int
) -> torch.Tensor:
    """`ds[g, n] = sum over k in group g of (x^T dy)[k, n] * (q - z)[k, n]`: fp32 `[G, N]`."""
    per_weight = (x.float().t() @ dy.float()) * centered
    return torch.zeros(groups, dy.shape[1]).index_add_(0, g_idx.long(), per_weight)


def int8_decode(
    codes: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor | None, values: torch.Tensor | None
) -> torch.Tensor:
    """`W[n, k] = codes[n, k] * scales[n, k // g]`, plus a value where an outlier lies: fp32 `[N, K]`."""
    group_size = codes.shape[1] // scales.shape[1]
    weight = codes.float() * scales.repeat_interleave(group_size, dim=1)
    if columns is not None and values is not None:
        for row, (row_columns, row_values) in enumerate(zip(columns.long(), values)):
            weight[row, row_columns] += row_values
    return weight


def lion(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of Lion (Chen et al., 2023, arXiv 2302.06675), all fp32: the new weight and the new momentum."""
    update = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
    weight = weight * (1 - lr * weight_decay) - lr * update
    return weight, beta2 * momentum + (1 - beta2) * gradient
