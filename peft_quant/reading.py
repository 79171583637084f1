"""Reading of text and JSON files that others wrote: an error names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class InvalidFileError(ValueError):
    """A file that is damaged, or of another kind than its name says; the message names it.

    Whatever is wrong with a file raises this or, for the weights of a checkpoint, [`InvalidCheckpointError`], which
    derives from it.
    """


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InvalidFileError: it is not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidFileError(f"{file} is not UTF-8 text ({error}): it is damaged, download it again.") from error


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        InvalidFileError: it holds anything else.
    """
    try:
        content = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidFileError(f"{file} is not JSON ({error}): it is damaged, download it again.") from error
    if not isinstance(content, dict):
        raise InvalidFileError(f"{file} holds a {type(content).__name__}, not a mapping: download it again.")
    return content
