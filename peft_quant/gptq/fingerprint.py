"""A short name for the packed weights an adapter was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from ..ops.packing import convert_zeros
from .check import PackedTensors


_SAMPLES = 256


def layer_digest(tensors: PackedTensors, bits: int, zero_offset: int) -> bytes:
    """SHA-256 of a layer's shapes and of evenly spaced samples of its tensors.

    It does not depend on the device, the layer's name or the zero point format, so that a file, the model loaded from
    it and the same checkpoint in the other format agree.
    """
    tensors = tensors._replace(qzeros=convert_zeros(tensors.qzeros, bits, zero_offset, 0))
    digest = hashlib.sha256(f"{bits} {tensors.scales.dtype}".encode())
    for tensor in tensors:
        update_with_samples(digest, tensor)
    return digest.digest()


def update_with_samples(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    """Add the shape of a tensor and evenly spaced samples of it to a digest."""
    digest.update(str(tuple(tensor.shape)).encode())
    flat = tensor.detach().reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    samples = flat[positions.to(flat.device)].cpu()
    samples = samples.to(torch.int64) if not samples.is_floating_point() else samples
    digest.update(samples.contiguous().view(torch.uint8).numpy().tobytes())


def fingerprint(digests: Iterable[bytes]) -> str:
    """Combine the digests of an adapter's layers, in any order, into 32 hexadecimal characters."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]
