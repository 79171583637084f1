"""GPTQ checkpoints as files: the tensors that `from_pretrained` reads, and copies with some of them replaced."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..reading import read_json, regular_file, regular_files, require_plain
from .check import InvalidCheckpointError, PackedTensors


LEGACY_CONFIG = "quantize_config.json"
"""Where auto-gptq wrote what is now `quantization_config` in `config.json`."""

_HEADER_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # of the format, in bytes
_LONGEST_NAME = 255  # of a file, in bytes
_MOST_DIMENSIONS = 64  # of PyTorch
_OTHER_FORMATS = ("pytorch_model*.bin", "consolidated*.pth", "*.gguf")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Replacement = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor in a file.

    Attributes:
        file: the safetensors file.
        dtype: the format's name for it, such as `"F16"` or `"I32"`.
        shape: the tensor's shape.
        begin: offset of its first byte in the file.
        end: offset behind its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype in PyTorch; None if it is unknown."""
        return _DTYPES.get(self.dtype)

    def read(self) -> torch.Tensor:
        """Read the tensor into memory of its own.

        Raises:
            InvalidCheckpointError: its dtype is unknown, or the file has become shorter.
        """
        dtype, size = self.torch_dtype, self.end - self.begin
        if dtype is None:
            raise InvalidCheckpointError(
                f"{self.file} has a tensor of {self.dtype} {self.shape}, which is none of the dtypes that are read, "
                f"{', '.join(_DTYPES)}."
            )
        if not size:
            return torch.empty(self.shape, dtype=dtype)
        content = bytearray(size)
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            if stream.readinto(content) != size:
                raise InvalidCheckpointError(f"{self.file} was changed while it was read: read it again.")
        return torch.frombuffer(content, dtype=dtype).view(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a `config.json` and the safetensors files that `from_pretrained` reads.

    Attributes:
        directory: its directory.
        config: the parsed `config.json`.
        tensors: the location of each tensor, by name.
        unread: other files with the same weights in the directory, which `from_pretrained` does not read.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    unread: tuple[Path, ...] = ()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint after checking that all its files exist and are complete.

        As in `from_pretrained`, the weights are in the file that `transformers_weights` in `config.json` names, in
        `model.safetensors`, or in the files that `model.safetensors.index.json` names, whichever is found first.

        Raises:
            FileNotFoundError: no `config.json`, or no weights under these names.
            InvalidFileError: a file is damaged; `InvalidCheckpointError` for weights that are damaged or missing, and
                for two shards with the same tensor.
        """
        directory = Path(directory)
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"{directory} has no config.json: pass the directory of a checkpoint.")
        config = read_json(config_file)
        files, index = _weight_files(directory, config)
        tensors = read_tensors(files)
        if index is not None:
            missing = sorted(index.keys() - tensors.keys())
            if missing:
                raise InvalidCheckpointError(
                    f"{len(missing)} tensors that {directory / SAFE_WEIGHTS_INDEX_NAME} names are missing, "
                    f"{missing[0]} first, which should be in {index[missing[0]]}: download the checkpoint again."
                )
        return cls(directory, config, tensors, _unread_weights(directory, tensors))

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Checkpoint:
        """The checkpoint with the files that `from_pretrained` has read.

        Raises:
            InvalidFileError: a file is damaged.
        """
        directory = files[0].parent
        config_file = directory / "config.json"
        return cls(directory, read_json(config_file) if config_file.is_file() else {}, read_tensors(files))

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization config: from `config.json`, or from auto-gptq's `quantize_config.json`."""
        return quantization_config(self.directory, self.config)

    @cached_property
    def packed_layers(self) -> list[str]:
        """The names of the layers whose weights are packed, in the order of the files."""
        return packed_layers(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            KeyError: the checkpoint has no tensor of that name.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.directory} has no tensor named {name!r}.")
        return self.tensors[name].read()

    def packed(self, layer: str) -> PackedTensors:
        """Read the tensors of a packed layer. Without a `g_idx`, as by GPTQ-for-LLaMa, groups are consecutive.

        Raises:
            InvalidCheckpointError: the layer lacks a tensor, or without a `g_idx` its shapes do not fit.
        """
        self.require_parts(layer)
        qweight, qzeros, scales = (self.tensor(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales"))
        if f"{layer}.g_idx" in self.tensors:
            return PackedTensors(qweight, qzeros, scales, self.tensor(f"{layer}.g_idx"))
        shapes = [tuple(tensor.shape) for tensor in (qweight, qzeros, scales)]
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[2][1]:
            raise InvalidCheckpointError(
                f"{layer} has qweight, qzeros and scales of the shapes {', '.join(map(str, shapes))} in "
                f"{self.directory}, which do not fit each other: download the checkpoint again."
            )
        in_features = qweight.numel() // qzeros.shape[1]  # whose bits cancel
        declared = (self.quantization or {}).get("group_size")
        size = group_size(in_features, scales.shape[0], declared if isinstance(declared, int) else -1)
        g_idx = torch.arange(in_features, dtype=torch.int32) // (size if size > 0 else in_features)
        return PackedTensors(qweight, qzeros, scales, g_idx)

    def require_parts(self, layer: str) -> None:
        """Check that a packed layer has all its tensors; `g_idx` may be missing without act-order.

        Raises:
            InvalidCheckpointError: it lacks one.
        """
        needed = ["qweight", "qzeros", "scales", *["g_idx"] * bool((self.quantization or {}).get("desc_act"))]
        missing = [part for part in needed if f"{layer}.{part}" not in self.tensors]
        if missing:
            raise InvalidCheckpointError(
                f"{layer} has no {' and no '.join(missing)} in {self.directory}: download the checkpoint again."
            )

    def copy_with(self, target: Path, names: Iterable[str], replacement: Replacement) -> None:
        """Copy the checkpoint to an existing, empty directory: some tensors are replaced, every other byte is equal.

        Args:
            target: the directory.
            names: the tensors to replace.
            replacement: returns the new tensor, of the same shape and dtype, given a name and the old tensor.

        Raises:
            InvalidFileError: a file or folder is a link that leads out of the checkpoint, as in
                [`regular_files`][peft_quant.reading.regular_files].
            ValueError: a replacement has another shape or dtype than the tensor in the file.
        """
        replaced: dict[Path, list[str]] = {}
        for name in sorted(names, key=lambda name: self.tensors[name].begin):
            replaced.setdefault(self.tensors[name].file, []).append(name)
        files = regular_files(self.directory)
        size = sum(file.stat().st_size for file in files)
        with tqdm(total=size, desc=f"writing {self.directory.name}", unit="B", unit_scale=True) as progress:
            for file in files:
                copy = target / file.relative_to(self.directory)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                if file in replaced:
                    with copy.open("r+b") as stream:
                        for name in replaced[file]:
                            stream.seek(self.tensors[name].begin)
                            stream.write(self._replaced(name, replacement))
                progress.update(file.stat().st_size)

    def _replaced(self, name: str, replacement: Replacement) -> bytes:
        old = self.tensor(name)
        new = replacement(name, old).detach().cpu().contiguous()
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"{name} is {old.dtype} of shape {tuple(old.shape)} in {self.tensors[name].file.name}, its "
                f"replacement is {new.dtype} of shape {tuple(new.shape)}."
            )
        return new.view(torch.uint8).numpy().tobytes()


def quantization_config(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization config of a checkpoint, given its `config.json`; None if it has none.

    A model of several models may have it in `text_config`. auto-gptq's `quantize_config.json` counts too.
    """
    for holder in (config, config.get("text_config")):
        found = holder.get("quantization_config") if isinstance(holder, dict) else None
        if isinstance(found, dict):
            return found
    legacy = directory / LEGACY_CONFIG
    return {"quant_method": "gptq", **read_json(legacy)} if legacy.is_file() else None


def group_size(in_features: int, groups: int, declared: int) -> int:
    """In-features that share a scale, -1 if all do: the declared number, unless it gives another number of groups."""
    if declared > 0 and -(-in_features // declared) == groups:
        return declared
    return -1 if groups == 1 else -(-in_features // groups)


def packed_layers(names: Iterable[str]) -> list[str]:
    """The names of the packed layers of a checkpoint, given the names of its tensors."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def read_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """Locate the tensors of a checkpoint's safetensors files, by name.

    Raises:
        InvalidCheckpointError: a file is truncated or not a safetensors file, or two have the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise InvalidCheckpointError(
                    f"{name} is in {tensors[name].file.name} and in {file.name} of {file.parent}: the "
                    "directory mixes two checkpoints. Download it again."
                )
            tensors[name] = tensor
    return tensors


def _weight_files(directory: Path, config: dict[str, Any]) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files that `from_pretrained` reads, and the index of their tensors, if there is one."""
    named = config.get("transformers_weights") or SAFE_WEIGHTS_NAME
    if not isinstance(named, str) or not _is_name(named):
        raise InvalidCheckpointError(
            f"{directory / 'config.json'} has transformers_weights={named!r}, which is not in its folder: name a file "
            "there."
        )
    first = directory / named
    index_file = first if first.name.endswith(".index.json") else directory / SAFE_WEIGHTS_INDEX_NAME
    if first.is_file() and first != index_file:
        return [first], None
    if not index_file.is_file():
        raise FileNotFoundError(_no_weights(directory))
    index = read_json(index_file).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise InvalidCheckpointError(f"{index_file} has no `weight_map` of names: download it again.")
    files = []
    for name in sorted(set(index.values())):
        file = directory / name
        if not _is_name(name) or not file.is_file():
            raise InvalidCheckpointError(
                f"{index_file} names the shard {name!r}, which {directory} does not have: download it again."
            )
        files.append(file)
    return files, index


def _is_name(name: str) -> bool:
    """Whether a file in a folder may have this name."""
    return Path(name).name == name and len(name.encode(errors="replace")) <= _LONGEST_NAME


def _no_weights(directory: Path) -> str:
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    if len(found) == 1:
        return (
            f"{directory} has no {SAFE_WEIGHTS_NAME}, which is where `from_pretrained` looks. If {found[0]} is the "
            f"whole model, rename it to {SAFE_WEIGHTS_NAME}."
        )
    if found:
        return (
            f"{directory} has {', '.join(found)} and neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, "
            "which are what `from_pretrained` reads: download the checkpoint again."
        )
    return (
        f"{directory} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Checkpoints in pickle format "
        "(*.bin, *.pt) are not read: load the model with transformers and save it with `save_pretrained` first."
    )


def _unread_weights(directory: Path, tensors: Mapping[str, StoredTensor]) -> tuple[Path, ...]:
    """Other safetensors files with the same tensors, and weights in other formats, which are not opened."""
    unread = {file for pattern in _OTHER_FORMATS for file in directory.glob(pattern)}
    for file in set(directory.glob("*.safetensors")) - {tensor.file for tensor in tensors.values()}:
        if not tensors.keys().isdisjoint(_read_header(file)):
            unread.add(file)
    return tuple(sorted(unread))


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a safetensors file (format: length of the header, header in JSON, data)."""
    size = regular_file(file).stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
        start = _HEADER_LENGTH_BYTES + length
        if start > size or length > _LONGEST_HEADER:
            raise InvalidCheckpointError(f"{file} is not a safetensors file or is truncated ({size} bytes).")
        header = stream.read(length)
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_repeats)
        require_plain(entries, str(file))
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata that are not text")
        tensors = {name: _locate(file, start, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidCheckpointError(f"{file} is not a safetensors file or is truncated ({size} bytes).") from error
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        stored, dtype = tensor.end - tensor.begin, tensor.torch_dtype
        if tensor.begin != end or (dtype is not None and math.prod(tensor.shape) * dtype.itemsize != stored):
            raise InvalidCheckpointError(
                f"{file} has a tensor of {tensor.dtype} {tensor.shape}, {name}, in the bytes {tensor.begin} to "
                f"{tensor.end}, which do not fit it, overlap with another one or leave a gap: the file is damaged, "
                "download it again."
            )
        end = tensor.end
    if size != end:
        raise InvalidCheckpointError(
            f"{file} is truncated or damaged: it has {size} bytes, its header describes {end}. Download it again."
        )
    return tensors


def _locate(file: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    """The tensor of an entry of the header, given where the data start. Raises any error if the entry is damaged."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or begin > end:
        raise ValueError(entry)
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in [*shape, begin, end]):
        raise ValueError(entry)
    return StoredTensor(file, dtype, tuple(shape), start + begin, start + end)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content
