"""Configs of models, as transformers reads them."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from .reading import InvalidFileError, read_json


def read_model_config(source: str | os.PathLike[str]) -> PretrainedConfig:
    """Read a model's config from a `config.json`, a directory with one, or the Hub, without downloading weights.

    Raises:
        OSError: the config was not found.
        InvalidFileError: it is damaged, or transformers cannot use it or does not know its kind of model.
    """
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if file.exists():
        read_json(file)
    elif path.is_dir():
        raise FileNotFoundError(f"{path} has no config.json: pass the directory of a checkpoint.")
    try:
        return AutoConfig.from_pretrained(os.fspath(source), trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # of any kind, from the class of the model's config
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InvalidFileError(
            f"transformers cannot use the config of {source} ({reason}): download it again, or update transformers."
        ) from error
