"""Teachers of the correction: a float model, in memory or streamed, or what one said, cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ... import gptq
from ...files import new_file
from .loss import TopK, top_k


logger = logging.getLogger(__name__)

_MANIFEST = "teacher.json"
_FORMAT = 1
_SHARD_BYTES = 64 << 20
_DIGEST_BYTES = 16
# inputs beside the token ids that change what a model says
_NOT_CACHED = ("inputs_embeds", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class TeacherOutput:
    """Of one batch.

    Attributes:
        distribution: logits of the batch's shape, or a `TopK` with a row for each position of the batch.
        hidden: the last hidden state `[..., hidden_size]`, if it was asked for.
    """

    distribution: torch.Tensor | TopK
    hidden: torch.Tensor | None


class ModelTeacher:
    """A float model, frozen. Weights that accelerate offloads are streamed.

    Raises:
        TypeError: not a [`~transformers.PreTrainedModel`].
        ValueError: quantized.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"The teacher is a {type(model).__name__}: give the float PreTrainedModel that was quantized, or the "
                "directory of a cache made by `cache_teacher`."
            )
        if any(gptq.is_packed(module) for module in model.modules()):
            raise ValueError(
                f"The teacher {model.config._name_or_path!r} is GPTQ-quantized itself: load the float model."
            )
        self.model = model.eval().requires_grad_(False)
        self._hooked = any(hasattr(module, "_hf_hook") for module in model.modules())

    def __str__(self) -> str:
        held: dict[str, int] = {}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            held[tensor.device.type] = held.get(tensor.device.type, 0) + tensor.nbytes
        streamed = held.pop("meta", 0)
        parts = [f"{size / 1e6:.1f} MB on {device}" for device, size in held.items()]
        if streamed:
            at_once = max(_own_bytes(module) for module in self.model.modules())
            parts.append(f"{streamed / 1e6:.1f} MB offloaded and streamed, {at_once / 1e6:.1f} MB at a time")
        return f"teacher {self.model.config._name_or_path or type(self.model).__name__}: {', '.join(parts)}"

    def to(self, device: torch.device) -> None:
        """Move the model, unless accelerate has placed it."""
        if not self._hooked:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, torch.Tensor], hidden: bool = False) -> TeacherOutput:
        with last_hidden_state(self.model, hidden) as states:
            logits = self.model(**inputs, use_cache=False).logits
        return TeacherOutput(logits, states[0] if hidden else None)

    def fingerprint(self) -> str:
        """Digest of a sample of the weights, the same wherever they are."""
        digest = hashlib.sha256()
        for name, module in self.model.named_modules():
            with align_module_device(module):
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    flat = parameter.detach().reshape(-1)
                    sample = flat[:: max(1, flat.numel() // 64)].float().cpu().contiguous()
                    digest.update(f"{name}.{parameter_name}{list(parameter.shape)}".encode())
                    digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:32]


class CachedTeacher:
    """The cache of a teacher, read sample by sample.

    A sample is found by the digest of its token ids, padding left out: neither shuffling, batching nor columns that a
    collator drops matter, and other data cannot be taken for the data of the cache.

    Args:
        directory: as written by [`cache_teacher`].

    Raises:
        ValueError: not a cache, an incomplete or a damaged one.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        shards = _Shards(self.directory, self.manifest["shards"])
        missing = self.manifest["samples"] - len(shards.entries)
        if missing:
            raise ValueError(
                f"The teacher cache {self.directory} is incomplete: {missing} of {self.manifest['samples']} samples "
                "are missing. Call `cache_teacher` again with the same arguments, and it goes on from there."
            )
        self._shards = shards

    def __str__(self) -> str:
        size = sum((self.directory / shard["file"]).stat().st_size for shard in self.manifest["shards"])
        return f"teacher cache {self.directory}: {size / 1e6:.1f} MB on disk, read a sample at a time"

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def __contains__(self, sample: Mapping[str, Any]) -> bool:
        ids = _own_ids(sample)
        return len(ids) < 2 or _digest(ids) in self._shards.entries

    def __call__(self, inputs: Mapping[str, torch.Tensor], hidden: bool = False) -> TeacherOutput:
        _refuse_other_inputs(inputs)
        input_ids = inputs["input_ids"]
        k = self.manifest["k"]
        indices = torch.zeros(*input_ids.shape, k, dtype=torch.int32)
        log_probs = torch.zeros(*input_ids.shape, k + 1, dtype=torch.float16)
        for row, (ids, own) in enumerate(_samples(inputs)):
            if len(ids) < 2:
                continue
            found = self._shards.read(_digest(ids))
            if found is None:
                raise ValueError(
                    f"The teacher cache {self.directory} (data {self.manifest['data']}) has no entry for a sample of "
                    f"{len(ids)} tokens that begins with {ids[:8].tolist()}: it was made for other data. Make one for "
                    "the samples as the model gets them, after truncation and packing, with `cache_teacher`."
                )
            positions = own.nonzero().squeeze(1)[:-1]
            indices[row, positions] = found.indices.int()
            log_probs[row, positions] = found.log_probs
        entries = TopK(indices.flatten(0, 1), log_probs.flatten(0, 1))
        return TeacherOutput(TopK(*(tensor.to(input_ids.device) for tensor in entries)), None)


def cache_teacher(
    teacher: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    *,
    k: int = 64,
    temperature: float = 1.0,
    tokenizer: Any = None,
) -> Path:
    """Write what a float model says of each next token to disk, for [`LRECTrainer`] to learn from without the model.

    Of each token are kept the `k` largest log-probabilities and that of all others together, in fp16, and the indices
    in 16 bits, or in 32 if the vocabulary needs them: `4 * k + 2` or `6 * k + 2` bytes, where fp32 logits take 4 times
    the vocabulary. The log says both before anything is written.

    Interrupted, it goes on where it stopped when called again with the same arguments; what is complete is kept.

    Args:
        teacher: the float model, in memory or offloaded by accelerate.
        data: samples with `input_ids`, a dataset, or batches of them, a data loader (padding is marked by
            `attention_mask`). Read twice. The ids must be those that the student will get.
        directory: where to write; a new or empty one, or a cache of the same teacher and data.
        k: entries to keep a token.
        temperature: of the distribution. Training at another one needs another cache, because what is left out
            cannot be told from what is kept.
        tokenizer: the teacher's, to be compared with the student's when training starts.

    Returns:
        The path of `directory`.

    Raises:
        ValueError: `directory` holds something else, or a cache of another teacher, other data or other settings; or
            values out of range.
        TypeError: `data` can be read only once.
    """
    source = ModelTeacher(teacher)
    vocab_size = teacher.config.get_text_config().vocab_size
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k={k}: use 1 to {vocab_size}, the size of the vocabulary.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: use a positive number.")
    if isinstance(data, Iterator):
        raise TypeError(f"`data` is a {type(data).__name__}, which can be read once: give a list or a dataset.")
    directory = Path(directory)
    lengths = _lengths(data)
    if not lengths:
        raise ValueError("`data` has no sample of two tokens or more.")
    tokens = sum(lengths.values()) - len(lengths)
    manifest = {
        "format": _FORMAT,
        "teacher": source.fingerprint(),
        "teacher_name": teacher.config._name_or_path,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size,
        "k": k,
        "temperature": temperature,
        "data": _set_digest(lengths),
        "samples": len(lengths),
        "tokens": tokens,
        "shards": [],
    }
    if directory.exists() and any(path.suffix != ".partial" for path in directory.iterdir()):
        found = _read_manifest(directory)
        settings = manifest.keys() - {"teacher_name", "shards"}
        different = sorted(name for name in settings if found[name] != manifest[name])
        if different:
            raise ValueError(
                f"{directory} is another teacher cache: it has "
                f"{', '.join(f'{name}={found[name]!r}' for name in different)}; asked for was "
                f"{', '.join(f'{name}={manifest[name]!r}' for name in different)}. Choose another directory or "
                "remove it."
            )
        manifest = found
    a_token = 2 * (k + 1) + k * _index_dtype(vocab_size).itemsize
    logger.info(
        f"{source}; its cache {directory}: {tokens * a_token / 1e6:.1f} MB on disk, {4 * vocab_size / a_token:.0f} "
        f"times less than the fp32 logits of {tokens} tokens"
    )
    directory.mkdir(parents=True, exist_ok=True)
    _write_manifest(directory, manifest)
    done = set(_Shards(directory, manifest["shards"]).entries)
    shard = _Shard()
    size = len(data) if isinstance(data, Sized) else None
    for batch in tqdm(data, total=size, desc="teacher cache", unit="batch"):
        batch = _as_batch(batch)
        samples = [(ids, own, _digest(ids)) for ids, own in _samples(batch)]
        if all(len(ids) < 2 or digest in done for ids, _, digest in samples):
            continue
        logits = source(_to(batch, None if source._hooked else teacher.device)).distribution
        for (ids, own, digest), scores in zip(samples, logits):
            if len(ids) > 1 and digest not in done:
                done.add(digest)
                shard.add(digest, top_k(scores[own.to(scores.device)][:-1], k, temperature), vocab_size)
        if shard.nbytes >= _SHARD_BYTES:
            shard = shard.write(directory, manifest)
    if shard.digests:
        shard.write(directory, manifest)
    return directory


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Digest of a tokenizer's vocabulary."""
    if tokenizer is None:
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]


def data_fingerprint(data: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the token ids of samples or batches, whatever their order."""
    return _set_digest(_lengths(data))


@contextmanager
def last_hidden_state(model: Any, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """Collect what a language model hands to its head in the forward passes within."""
    states: list[torch.Tensor] = []
    if not wanted:
        yield states
        return
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        yield states
    finally:
        handle.remove()


class _Shard:
    """Samples to be written to one file."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.indices: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []
        self.nbytes = 0

    def add(self, digest: bytes, entries: TopK, vocab_size: int) -> None:
        self.digests.append(digest)
        self.indices.append(entries.indices.cpu().to(_index_dtype(vocab_size)))
        self.log_probs.append(entries.log_probs.cpu().half())
        self.nbytes += self.indices[-1].nbytes + self.log_probs[-1].nbytes

    def write(self, directory: Path, manifest: dict[str, Any]) -> _Shard:
        """Write the file, enter it into the manifest, and return an empty shard."""
        path = directory / f"shard-{len(manifest['shards']):05d}.safetensors"
        tensors = {
            "digests": torch.tensor([list(digest) for digest in self.digests], dtype=torch.uint8),
            "lengths": torch.tensor([len(entries) for entries in self.indices]),
            "indices": torch.cat(self.indices),
            "log_probs": torch.cat(self.log_probs),
        }
        with new_file(path) as file:
            save_file(tensors, file)
        manifest["shards"].append({"file": path.name, "sha256": _file_digest(path)})
        _write_manifest(directory, manifest)
        return _Shard()


class _Shards:
    """Where each sample is in the files of a cache, all of which are checked.

    Attributes:
        entries: file, first row and number of rows, by digest.
    """

    def __init__(self, directory: Path, shards: list[dict[str, str]]) -> None:
        self.entries: dict[bytes, tuple[Path, int, int]] = {}
        for shard in shards:
            path = directory / shard["file"]
            if not path.exists() or _file_digest(path) != shard["sha256"]:
                raise ValueError(
                    f"{path} is {'damaged' if path.exists() else 'missing'}: remove {directory} and call "
                    "`cache_teacher` again."
                )
            with safe_open(path, framework="pt") as file:
                digests, lengths = file.get_tensor("digests"), file.get_tensor("lengths")
            starts = (lengths.cumsum(0) - lengths).tolist()
            for digest, start, length in zip(digests, starts, lengths.tolist()):
                self.entries[digest.numpy().tobytes()] = path, start, length

    def read(self, digest: bytes) -> TopK | None:
        if digest not in self.entries:
            return None
        path, start, length = self.entries[digest]
        with safe_open(path, framework="pt") as file:
            return TopK(*(file.get_slice(name)[start : start + length] for name in ("indices", "log_probs")))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    if not path.exists():
        raise ValueError(f"{directory} is not a teacher cache: it has no {_MANIFEST}. Make one with `cache_teacher`.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"The teacher cache {directory} has format {manifest.get('format')}, known is {_FORMAT}: make it anew "
            "with `cache_teacher`, or use the version of peft_quant that wrote it."
        )
    return manifest


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    with new_file(directory / _MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _index_dtype(vocab_size: int) -> torch.dtype:
    return torch.uint16 if vocab_size <= 1 << 16 else torch.int32


def _digest(ids: torch.Tensor) -> bytes:
    return hashlib.sha256(ids.to("cpu", torch.int64).numpy().astype("<i8").tobytes()).digest()[:_DIGEST_BYTES]


def _as_batch(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Ids and mask of a sample or a batch, as a batch."""
    _refuse_other_inputs(sample)
    batch = {name: torch.as_tensor(sample[name]) for name in ("input_ids", "attention_mask") if name in sample}
    return {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in batch.items()}


def _samples(batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The token ids of each sample, padding left out, and where in its row they are."""
    input_ids = batch["input_ids"].cpu()
    mask = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(input_ids).bool()
    for ids, own in zip(input_ids, mask):
        yield ids[own], own


def _lengths(data: Iterable[Mapping[str, Any]]) -> dict[bytes, int]:
    """Number of tokens by digest, of the samples that have anything to predict."""
    return {_digest(ids): len(ids) for batch in data for ids, _ in _samples(_as_batch(batch)) if len(ids) > 1}


def _set_digest(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def _own_ids(sample: Mapping[str, Any]) -> torch.Tensor:
    ((ids, _),) = _samples(_as_batch(sample))
    return ids


def _refuse_other_inputs(inputs: Mapping[str, Any]) -> None:
    others = [name for name in _NOT_CACHED if name in inputs]
    if others:
        raise ValueError(
            f"A teacher cache knows a sample by its token ids alone, and these have {others}: leave them out, or use "
            "a live teacher."
        )


def _own_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False))


def _to(batch: dict[str, torch.Tensor], device: torch.device | None) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()} if device is not None else batch
