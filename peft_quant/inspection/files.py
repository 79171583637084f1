"""Files of checkpoints and adapters, by path or Hub id."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..gptq.checkpoint import LEGACY_CONFIG, Checkpoint
from ..reading import read_json


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(path: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Whether a directory or Hub repository holds an adapter rather than a model. Offline, the Hub cache is used.

    Raises:
        LocalEntryNotFoundError: neither the Hub nor its cache has the repository.
        RepositoryNotFoundError: there is no such repository.
    """
    if os.path.isdir(path):
        return Path(path, ADAPTER_CONFIG).is_file()
    try:
        hf_hub_download(os.fspath(path), ADAPTER_CONFIG, revision=revision, token=token)
    except LocalEntryNotFoundError:
        if isinstance(try_to_load_from_cache(os.fspath(path), "config.json", revision=revision), str):
            return False
        raise
    except EntryNotFoundError:
        return False
    return True


def adapter_directory(path: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """The directory of an adapter, downloaded if necessary."""
    if os.path.isdir(path):
        return Path(path)
    return Path(
        snapshot_download(
            os.fspath(path), revision=revision, token=token, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        )
    )


def read_config(path: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Checkpoint:
    """Read the configuration of a checkpoint, without its tensors.

    Raises:
        FileNotFoundError: there is no `config.json`.
        InvalidFileError: it is damaged.
    """
    if os.path.isdir(path):
        file = Path(path, "config.json")
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} has no config.json and no {ADAPTER_CONFIG}: it is no checkpoint or adapter."
            )
    else:
        file = Path(hf_hub_download(os.fspath(path), "config.json", revision=revision, token=token))
        with suppress(EntryNotFoundError):
            hf_hub_download(os.fspath(path), LEGACY_CONFIG, revision=revision, token=token)
    return Checkpoint(file.parent, read_json(file), {})


def open_checkpoint(path: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Checkpoint:
    """Open a checkpoint, downloading its weights if necessary."""
    if not os.path.isdir(path):
        path = snapshot_download(
            os.fspath(path), revision=revision, token=token, allow_patterns=["*.safetensors", "*.json"]
        )
    return Checkpoint.open(path)
