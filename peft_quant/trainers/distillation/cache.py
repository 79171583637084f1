"""A teacher that reads cached top-k log-probabilities from disk.

A cache is a directory with a manifest, `teacher.json`, and safetensors shards. Samples are looked up by a digest of
their token ids without padding, so shuffling, batching and columns that a collator drops do not matter, and a cache of
other data is detected.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...files import new_file, only_writer
from ...gptq.checkpoint import read_tensors
from ...reading import InvalidFileError, read_json, regular_file
from .loss import TopK, top_k
from .teacher import ModelTeacher, TeacherOutput, tokenizer_fingerprint


logger = logging.getLogger(__name__)

_MANIFEST = "teacher.json"
_FORMAT = 1
_SHARD_BYTES = 64 << 20
_DIGEST_BYTES = 16
_ENTRIES: dict[str, Any] = {
    "teacher": str,
    "tokenizer": (str, type(None)),
    "vocab_size": int,
    "k": int,
    "temperature": (int, float),
    "data": str,
    "samples": int,
    "tokens": int,
    "shards": list,
}
"""The types of what a manifest must have."""

# inputs other than token ids that change a model's output
_NOT_CACHED = ("inputs_embeds", "position_ids", "token_type_ids")


class CachedTeacher:
    """A teacher's cache, read sample by sample.

    Args:
        directory: the directory written by [`cache_teacher`].

    Raises:
        InvalidFileError: a file is damaged.
        ValueError: the directory is not a cache, or the cache is incomplete.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self._shards = _Shards(self.directory, self.manifest)
        missing = self.manifest["samples"] - len(self._shards.entries)
        if missing:
            raise ValueError(
                f"The teacher cache {self.directory} is incomplete: {missing} of {self.manifest['samples']} samples "
                "are missing. Call `cache_teacher` again with the same arguments to resume."
            )

    def __str__(self) -> str:
        size = sum((self.directory / shard["file"]).stat().st_size for shard in self.manifest["shards"])
        return f"teacher cache {self.directory}: {size / 1e6:.1f} MB on disk, read a sample at a time"

    def to(self, device: torch.device) -> None:
        """Does nothing; a cache stays on disk."""

    def __contains__(self, sample: Mapping[str, Any]) -> bool:
        ((ids, _),) = _samples(_as_batch(sample))
        return len(ids) < 2 or _digest(ids) in self._shards.entries

    def __call__(self, inputs: Mapping[str, torch.Tensor], hidden: bool = False) -> TeacherOutput:
        _refuse_other_inputs(inputs)
        input_ids = inputs["input_ids"]
        k = self.manifest["k"]
        indices = torch.zeros(*input_ids.shape, k, dtype=torch.int32)
        log_probs = torch.zeros(*input_ids.shape, k + 1, dtype=torch.float16)
        for row, (ids, mask) in enumerate(_samples(inputs)):
            if len(ids) < 2:
                continue
            found = self._shards.read(_digest(ids))
            if found is None:
                raise ValueError(
                    f"The teacher cache {self.directory} (data {self.manifest['data']}) has no entry for a sample of "
                    f"{len(ids)} tokens that begins with {ids[:8].tolist()}: it was made for other data. Make one for "
                    "the samples as the model gets them, after truncation and packing, with `cache_teacher`."
                )
            positions = mask.nonzero().squeeze(1)[:-1]
            if len(found.indices) != len(positions) or int(found.indices.int().max()) >= self.manifest["vocab_size"]:
                raise InvalidFileError(
                    f"The teacher cache {self.directory} has other entries for a sample of {len(ids)} tokens than its "
                    f"vocabulary and length allow. {_remake(self.directory)}"
                )
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
    """Write a float model's next-token distributions to disk, for [`DistillationTrainer`] to train without the model.

    For each token, the cache holds the `k` largest log-probabilities and the total of all others in fp16, and the
    indices in 16 bits, or 32 for a vocabulary above 65,536 entries. That is `4 * k + 2` or `6 * k + 2` bytes, compared
    with 4 times the vocabulary size for fp32 logits. Both sizes are logged before anything is written.

    After an interruption, a call with the same arguments resumes and keeps complete shards.

    Args:
        teacher: the float model, in memory or offloaded by accelerate.
        data: samples with `input_ids`, such as a dataset, or batches of them, such as a data loader (padding is marked
            by `attention_mask`). They are read twice. The ids must be those that the student will get.
        directory: a new or empty directory, or an unfinished cache of the same teacher and data.
        k: entries to keep per token.
        temperature: temperature of the distribution. Training at another one needs another cache, because the dropped
            entries cannot be recomputed.
        tokenizer: the teacher's tokenizer, which is compared with the student's when training starts.

    Returns:
        The path of `directory`.

    Raises:
        InvalidFileError: a file of the unfinished cache is damaged.
        ValueError: `directory` holds other files or a cache of another teacher, other data or other settings; an
            argument is out of range; or the teacher gives NaN or infinite logits, which are not written.
        TypeError: `data` can be read only once.
        BlockingIOError: another process is writing the cache.
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
    token_bytes = 2 * (k + 1) + k * _index_dtype(vocab_size).itemsize
    logger.info(
        f"{source}; its cache {directory}: {tokens * token_bytes / 1e6:.1f} MB on disk, "
        f"{4 * vocab_size / token_bytes:.0f} times less than the fp32 logits of {tokens} tokens"
    )
    directory.mkdir(parents=True, exist_ok=True)
    with only_writer(directory):
        manifest = _resume(directory, manifest)
        _write_manifest(directory, manifest)
        _fill(source, data, _Shards(directory, manifest))
    return directory


def data_fingerprint(data: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the token ids of samples or batches, independent of their order."""
    return _set_digest(_lengths(data))


def _resume(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an unfinished cache in the directory, otherwise the given one.

    Raises:
        ValueError: the directory holds other files, or a cache with other settings.
    """
    if all(path.suffix == ".partial" for path in directory.iterdir()):
        return manifest
    found = _read_manifest(directory)
    settings = manifest.keys() - {"teacher_name", "shards"}
    different = sorted(name for name in settings if found[name] != manifest[name])
    if different:
        raise ValueError(
            f"{directory} is another teacher cache: it has "
            f"{', '.join(f'{name}={found[name]!r}' for name in different)}; asked for was "
            f"{', '.join(f'{name}={manifest[name]!r}' for name in different)}. Choose another directory or remove it."
        )
    return found


def _fill(teacher: ModelTeacher, data: Iterable[Mapping[str, Any]], shards: _Shards) -> None:
    """Run the teacher on the samples missing from a cache and write its output."""
    k, temperature = shards.manifest["k"], shards.manifest["temperature"]
    for batch in tqdm(data, total=len(data) if isinstance(data, Sized) else None, desc="teacher cache", unit="batch"):
        inputs = _as_batch(batch)
        samples = {row: (_digest(ids), mask) for row, (ids, mask) in enumerate(_samples(inputs)) if len(ids) > 1}
        if all(digest in shards for digest, _ in samples.values()):
            continue
        if not teacher.is_placed:
            inputs = {name: tensor.to(teacher.model.device) for name, tensor in inputs.items()}
        logits: Any = teacher(inputs).distribution
        for row, (digest, mask) in samples.items():
            if digest not in shards:
                sample = top_k(logits[row, mask.to(logits.device)][:-1], k, temperature)
                if TeacherOutput(sample, None).has_nan():
                    ids = inputs["input_ids"][row].cpu()[mask]
                    raise ValueError(
                        f"The teacher gives NaN or infinite logits for a sample of {len(ids)} tokens that begins with "
                        f"{ids[:8].tolist()}, and a cache of them would spoil the student. If the teacher is in fp16, "
                        "load it in bf16 or fp32; else leave the sample out."
                    )
                shards.add(digest, sample)
        if shards.unwritten_bytes >= _SHARD_BYTES:
            shards.write()
    if shards.unwritten:
        shards.write()


class _Shards:
    """The shards of a cache, checked against their digests, and samples for the next shard.

    Attributes:
        entries: shard, first row and number of rows of each written sample, by digest.
        unwritten: samples for the next shard, by digest.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.entries: dict[bytes, tuple[Path, int, int]] = {}
        self.unwritten: dict[bytes, TopK] = {}
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            if not path.exists() or _file_digest(regular_file(path)) != shard.get("sha256"):
                found = "damaged" if path.exists() else "missing"
                raise InvalidFileError(f"{path} is {found}: {_remake(directory)}")
            rows = self._rows(path)
            with safe_open(path, framework="pt") as file:
                digests, lengths = file.get_tensor("digests"), file.get_tensor("lengths")
            if (lengths < 0).any() or (lengths > rows).any() or int(lengths.sum()) != rows:
                raise InvalidFileError(f"{path} has {rows} rows, and others in its samples: {_remake(directory)}")
            self._enter(path, [digest.numpy().tobytes() for digest in digests], lengths)

    def _rows(self, path: Path) -> int:
        """The number of tokens in a shard, whose tensors are checked for names, shapes and dtypes."""
        stored = read_tensors([path])
        samples, rows = (stored[name].shape[:1] if name in stored else () for name in ("lengths", "indices"))
        k = self.manifest["k"]
        expected = {
            "digests": (torch.uint8, (*samples, _DIGEST_BYTES)),
            "lengths": (torch.int64, samples),
            "indices": (_index_dtype(self.manifest["vocab_size"]), (*rows, k)),
            "log_probs": (torch.float16, (*rows, k + 1)),
        }
        found = {name: (tensor.torch_dtype, tensor.shape) for name, tensor in stored.items()}
        if found != expected:
            raise InvalidFileError(f"{path} has other tensors than a shard with k={k}: {_remake(self.directory)}")
        return rows[0]

    def _enter(self, path: Path, digests: Iterable[bytes], lengths: torch.Tensor) -> None:
        starts = lengths.cumsum(0) - lengths
        for digest, start, length in zip(digests, starts.tolist(), lengths.tolist()):
            self.entries[digest] = path, start, length

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.entries or digest in self.unwritten

    def read(self, digest: bytes) -> TopK | None:
        if digest not in self.entries:
            return None
        path, start, length = self.entries[digest]
        with safe_open(path, framework="pt") as file:
            return TopK(*(file.get_slice(name)[start : start + length] for name in ("indices", "log_probs")))

    def add(self, digest: bytes, sample: TopK) -> None:
        indices = sample.indices.cpu().to(_index_dtype(self.manifest["vocab_size"]))
        self.unwritten[digest] = TopK(indices, sample.log_probs.cpu().half())

    @property
    def unwritten_bytes(self) -> int:
        return sum(tensor.nbytes for sample in self.unwritten.values() for tensor in sample)

    def write(self) -> None:
        """Write the next shard and add it to the manifest."""
        path = self.directory / _shard_name(len(self.manifest["shards"]))
        indices, log_probs = zip(*self.unwritten.values())
        lengths = torch.tensor([len(rows) for rows in indices])
        tensors = {
            "digests": torch.tensor([list(digest) for digest in self.unwritten], dtype=torch.uint8),
            "lengths": lengths,
            "indices": torch.cat(indices),
            "log_probs": torch.cat(log_probs),
        }
        with new_file(path) as file:
            save_file(tensors, file)
        self.manifest["shards"].append({"file": path.name, "sha256": _file_digest(path)})
        _write_manifest(self.directory, self.manifest)
        self._enter(path, self.unwritten, lengths)
        self.unwritten.clear()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    if not path.exists():
        raise ValueError(f"{directory} is not a teacher cache: it has no {_MANIFEST}. Make one with `cache_teacher`.")
    manifest = read_json(path)
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"The teacher cache {directory} has format {manifest.get('format')}, known is {_FORMAT}: make it again "
            "with `cache_teacher`, or use the version of peft_quant that wrote it."
        )
    for name, types in _ENTRIES.items():
        value = manifest.get(name)
        if name not in manifest or not isinstance(value, types) or isinstance(value, bool):
            raise InvalidFileError(f"{path} has {name}={value!r:.200}: {_remake(directory)}")
    if not 1 <= manifest["k"] <= manifest["vocab_size"]:
        raise InvalidFileError(
            f"{path} has k={manifest['k']} and vocab_size={manifest['vocab_size']}: {_remake(directory)}"
        )
    for number, shard in enumerate(manifest["shards"]):
        if not isinstance(shard, dict) or shard.get("file") != _shard_name(number):
            raise InvalidFileError(
                f"{path} has the shard {shard!r:.200}, whose file is not {_shard_name(number)}: {_remake(directory)}"
            )
    return manifest


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _remake(directory: Path) -> str:
    return f"remove {directory} and call `cache_teacher` again."


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


def _set_digest(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def _as_batch(sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of a sample or batch, as a batch."""
    _refuse_other_inputs(sample)
    batch = {name: torch.as_tensor(sample[name]) for name in ("input_ids", "attention_mask") if name in sample}
    return {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in batch.items()}


def _samples(batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each sample's token ids without padding, and the mask of its row."""
    input_ids = batch["input_ids"].cpu()
    masks = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(input_ids).bool()
    for ids, mask in zip(input_ids, masks):
        yield ids[mask], mask


def _lengths(data: Iterable[Mapping[str, Any]]) -> dict[bytes, int]:
    """Number of tokens of each sample with at least two, by digest."""
    return {_digest(ids): len(ids) for batch in data for ids, _ in _samples(_as_batch(batch)) if len(ids) > 1}


def _refuse_other_inputs(inputs: Mapping[str, Any]) -> None:
    others = [name for name in _NOT_CACHED if name in inputs]
    if others:
        raise ValueError(
            f"A teacher cache finds a sample by its token ids alone, and these have {others}: leave them out, or use "
            "a live teacher."
        )
