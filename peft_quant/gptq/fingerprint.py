"""Fingerprints of the base an adapter was trained on: of its packed layers, and of its whole checkpoint.

Both are SHA-256 over every value. Neither depends on the device, the zero point format or the sharding. The first is
taken from layers in memory or in files; the second from files only, as embeddings, norms and heads may have another
dtype in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..ops.packed.packing import WORD_BITS, convert_zeros
from .check import PackedTensors
from .checkpoint import read_tensors


_SAMPLES = 256
_SAMPLED_LENGTH = 32  # hexadecimal characters; those of every value have 64

Item = TypeVar("Item")


def layer_digest(tensors: PackedTensors, bits: int, zero_offset: int, *, sampled: bool = False) -> bytes:
    """SHA-256 of a layer's shapes and values, independent of its name.

    Args:
        tensors: the layer's tensors.
        bits: bits per code.
        zero_offset: the amount subtracted from its stored zero points.
        sampled: hash evenly spaced values only, as older versions did.
    """
    tensors = tensors._replace(
        qzeros=convert_zeros(tensors.qzeros, bits, zero_offset, 0), g_idx=tensors.g_idx.to(torch.int32)
    )
    digest = hashlib.sha256(f"{bits} {tensors.scales.dtype}".encode())
    for tensor in tensors:
        if sampled:
            update_with_samples(digest, tensor)
        else:
            _update(digest, tensor)
    return digest.digest()


def update_with_samples(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    """Add the shape of a tensor and evenly spaced samples of it to a digest."""
    digest.update(str(tuple(tensor.shape)).encode())
    flat = tensor.detach().reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    samples = flat[positions.to(flat.device)].cpu()
    samples = samples.to(torch.int64) if not samples.is_floating_point() else samples
    digest.update(samples.contiguous().view(torch.uint8).numpy().tobytes())


def fingerprint(digests: Iterable[bytes], *, sampled: bool = False) -> str:
    """Combine the digests of layers, in any order, into 64 hexadecimal characters; 32 if `sampled`."""
    combined = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return combined[:_SAMPLED_LENGTH] if sampled else combined


def is_sampled(recorded: str) -> bool:
    """Whether a recorded fingerprint is of samples, as older versions recorded it."""
    return len(recorded) == _SAMPLED_LENGTH


def in_parallel(function: Callable[[Item], bytes], items: Iterable[Item]) -> list[bytes]:
    """Digest items on as many threads as there are processors: hashing releases the interpreter lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, items))


def checkpoint_digest(files: Iterable[Path], zero_offset: int) -> str:
    """SHA-256 of the names, shapes and values of all tensors of a checkpoint, as 64 hexadecimal characters.

    Floating point tensors outside packed layers count by value, not by dtype. Digests of unchanged files are cached.

    Args:
        files: the safetensors files.
        zero_offset: the amount subtracted from their stored zero points.
    """
    return _checkpoint_digest(
        tuple((file, (status := file.stat()).st_size, status.st_mtime_ns) for file in sorted(files)), zero_offset
    )


@lru_cache(maxsize=16)
def _checkpoint_digest(files: tuple[tuple[Path, int, int], ...], zero_offset: int) -> str:
    tensors = read_tensors([file for file, _, _ in files])

    def digest_of(name: str) -> bytes:
        tensor = tensors[name].read()
        layer, _, part = name.rpartition(".")
        if part == "qzeros" and f"{layer}.scales" in tensors:
            bits = tensor.shape[1] * WORD_BITS // tensors[f"{layer}.scales"].shape[-1]
            tensor = convert_zeros(tensor, bits, zero_offset, 0)
        elif part == "g_idx":
            tensor = tensor.to(torch.int32)
        elif tensor.is_floating_point() and f"{layer}.qweight" not in tensors:
            tensor = tensor.float()
        digest = hashlib.sha256(name.encode())
        _update(digest, tensor)
        return digest.digest()

    return hashlib.sha256(b"".join(in_parallel(digest_of, sorted(tensors)))).hexdigest()


def _update(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    digest.update(str(tuple(tensor.shape)).encode())
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(values)
