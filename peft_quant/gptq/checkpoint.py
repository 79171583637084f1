"""GPTQ checkpoints as files: reading tensors by name, and copying a checkpoint with some tensors replaced."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from .check import InvalidCheckpointError


_HEADER_LENGTH_BYTES = 8

Replacement = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A directory with `config.json` and `*.safetensors` shards.

    Attributes:
        directory: where it lies.
        config: the parsed `config.json`.
        shards: the file that holds each tensor, by tensor name.
    """

    directory: Path
    config: dict[str, Any]
    shards: dict[str, Path]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint after checking that every shard is whole.

        Raises:
            FileNotFoundError: no `config.json` or no `*.safetensors` file.
            InvalidCheckpointError: a shard is truncated or not a safetensors file.
        """
        directory = Path(directory)
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"{directory} has no config.json: pass the directory of a checkpoint.")
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{directory} has no *.safetensors file. Checkpoints in pickle format (*.bin, *.pt) are not read: "
                "load the model with transformers and save it with `save_pretrained` first."
            )
        shards = {name: file for file in files for name in read_header(file)[0]}
        return cls(directory, json.loads(config_file.read_text(encoding="utf-8")), shards)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            KeyError: the checkpoint has no tensor of that name.
        """
        if name not in self.shards:
            raise KeyError(f"{self.directory} has no tensor named {name!r}.")
        with safe_open(self.shards[name], framework="pt") as shard:
            return shard.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from its file's header."""
        with safe_open(self.shards[name], framework="pt") as shard:
            return tuple(shard.get_slice(name).get_shape())

    def copy_with(self, target: Path, names: set[str], replacement: Replacement) -> None:
        """Copy the checkpoint to an existing, empty directory, with some tensors replaced and all else byte-equal.

        Args:
            names: the tensors to replace.
            replacement: gives the new tensor for a name and its old tensor, of the same shape and dtype.

        Raises:
            ValueError: a replacement has another shape or dtype than the tensor in the file.
        """
        entries = [entry for entry in sorted(self.directory.iterdir()) if not entry.name.startswith(".")]
        size = sum(entry.stat().st_size for entry in entries if entry.is_file())
        with tqdm(total=size, desc=f"writing {self.directory.name}", unit="B", unit_scale=True) as progress:
            for entry in entries:
                if entry.is_dir():
                    shutil.copytree(entry, target / entry.name)
                    continue
                shutil.copyfile(entry, target / entry.name)
                if entry.suffix == ".safetensors":
                    _replace_tensors(target / entry.name, names, replacement)
                progress.update(entry.stat().st_size)


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Tensor entries of a safetensors file and where its data begins (format: length, JSON header, data).

    Raises:
        InvalidCheckpointError: the file is truncated or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
        data_start = _HEADER_LENGTH_BYTES + length
        try:
            header = json.loads(stream.read(length)) if data_start <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise InvalidCheckpointError(f"{file} is not a safetensors file or is truncated ({size} bytes).")
    header.pop("__metadata__", None)
    expected = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise InvalidCheckpointError(
            f"{file} is truncated or damaged: it has {size} bytes, its header describes {expected}. Download it again."
        )
    return header, data_start


def _replace_tensors(file: Path, names: set[str], replacement: Replacement) -> None:
    header, data_start = read_header(file)
    for name in sorted(names & header.keys(), key=lambda name: header[name]["data_offsets"]):
        with safe_open(file, framework="pt") as shard:
            old = shard.get_tensor(name).clone()
        new = replacement(name, old).detach().cpu().contiguous()
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"{name} is {old.dtype} of shape {tuple(old.shape)} in {file.name}, its replacement is {new.dtype} of "
                f"shape {tuple(new.shape)}."
            )
        with file.open("r+b") as stream:
            stream.seek(data_start + header[name]["data_offsets"][0])
            stream.write(new.view(torch.uint8).numpy().tobytes())


def refuse_existing(path: str | os.PathLike[str]) -> Path:
    """The path of what is to be written.

    Raises:
        FileExistsError: it exists already.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists already: choose another directory or remove it.")
    return target


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a directory that appears under its name only once it is complete.

    Yields a temporary directory beside `path`, renamed to it at the end and removed if an error is raised.

    Raises:
        FileExistsError: `path` exists already.
    """
    target = refuse_existing(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def replaced_files(path: str | os.PathLike[str], stale: str) -> Iterator[Path]:
    """Fill a directory whose files appear, each whole, once all of them are complete.

    Yields a temporary directory beside `path`, renamed to it if there is none. Else its files take the place of those
    of the same name, and what an error interrupts leaves all of the old ones.

    Args:
        path: the directory.
        stale: pattern of files that belong to what is replaced, of which those not written again are removed.
    """
    target = Path(path)
    if not target.exists():
        with new_directory(target) as directory:
            yield directory
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        yield Path(name)
        written = {entry.name: entry for entry in sorted(Path(name).iterdir())}
        for entry in written.values():
            if entry.is_dir():
                shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
            else:
                entry.replace(target / entry.name)
        for file in target.glob(stale):
            if file.name not in written:
                file.unlink()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
