"""Files that others wrote: which of them are read, their text, JSON and YAML, and the error that names them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml


_LONGEST_TEXT = 100_000_000  # bytes
_LONGEST_YAML = 100_000  # characters, which take half a second
_DEEPEST = 100
_MOST_FILES = 100_000
_DOWNLOAD, _MEND = "it is damaged, download it again", "mend it"
_FENCE = "---"  # around the metadata of a Markdown file


class InvalidFileError(ValueError):
    """A file that is damaged, or of another kind than its name says; the message names it.

    Whatever is wrong with a file raises this or, for the weights of a checkpoint, [`InvalidCheckpointError`], which
    derives from it.
    """


def regular_file(file: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """Check that a file may be read: opening it does not block, and its content is the folder's.

    A link may lead to a file of the folder or, from a snapshot in the Hub's cache, to the cache's `blobs`.

    Args:
        file: the file.
        folder: the folder that it belongs to, which may itself be a link; by default the one that it lies in.

    Returns:
        The file as a path, links not resolved.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: it is a link that leads elsewhere, or something else than a regular file.
    """
    path = Path(file)
    folder = path.parent if folder is None else folder
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if path.is_symlink():
            raise InvalidFileError(f"{path} is a link that leads nowhere ({path.readlink()}): remove it.") from error
        raise
    if not stat.S_ISREG(target.stat().st_mode):
        raise InvalidFileError(f"{path} is not a regular file, but a folder, a pipe or a device: remove it.")
    root = Path(os.path.realpath(folder))
    if not any(target.is_relative_to(place) for place in (root, *_blobs(root))):
        raise InvalidFileError(
            f"{path} is a link to {target}, outside of {folder}: links are followed only within the folder. Copy the "
            "file there instead."
        )
    return path


def regular_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All files in a folder and its subfolders, sorted, except those in it whose names begin with a dot.

    Raises:
        InvalidFileError: a file must not be read, as in [`regular_file`]; a folder is a link; or there are more than
            100,000 entries.
    """
    root, found, entries = Path(folder), [], 0
    pending = [root]
    while pending:
        place = pending.pop()
        for entry in os.scandir(place):
            if place == root and entry.name.startswith("."):
                continue
            entries += 1
            if entries > _MOST_FILES:
                raise InvalidFileError(f"{root} has more than {_MOST_FILES} files: move what is not needed elsewhere.")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif os.path.isdir(entry.path):
                raise InvalidFileError(
                    f"{entry.path} is a link to a folder, {Path(entry.path).readlink()}, which is not followed: copy "
                    "the folder there instead, or remove the link."
                )
            else:
                found.append(regular_file(entry.path, root))
    return sorted(found)


def read_text(file: str | os.PathLike[str], way_out: str = _DOWNLOAD) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: it is not UTF-8, is longer than 100 MB, or must not be read, as in [`regular_file`].
    """
    path = regular_file(file)
    size = path.stat().st_size
    if size > _LONGEST_TEXT:
        raise InvalidFileError(f"{path} has {size / 1e6:.0f} MB, which is no text of a model: {way_out}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidFileError(f"{path} is not UTF-8 text ({error}): {way_out}.") from error


def read_json(file: str | os.PathLike[str], way_out: str = _DOWNLOAD) -> dict[str, Any]:
    """The mapping in a JSON file, where NaN and Infinity are numbers, and the last of equal keys holds.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: it holds anything else, or cannot be read as text.
    """
    return parse_json(read_text(file, way_out), str(file), way_out)


def parse_json(text: str, source: str, way_out: str = _DOWNLOAD) -> dict[str, Any]:
    """The mapping in a JSON text, as [`read_json`].

    Args:
        text: the text.
        source: its name in errors.

    Raises:
        InvalidFileError: it is anything else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{source} is not JSON ({error}): {way_out}.") from error
    if not isinstance(content, dict):
        raise InvalidFileError(f"{source} holds a {type(content).__name__}, not a mapping: {way_out}.")
    require_plain(content, source, way_out)
    return content


def require_plain(content: Any, source: str, way_out: str = _DOWNLOAD) -> None:
    """Check that what was parsed from a file can be copied and written again.

    Raises:
        InvalidFileError: it is nested more than 100 deep, or holds text that UTF-8 cannot encode.
    """
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise InvalidFileError(f"{source} is nested more than {_DEEPEST} deep: {way_out}.")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += (*value.keys(), *value.values())
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise InvalidFileError(f"{source} has text that is not Unicode ({error}): {way_out}.") from error
        level = inner


def parse_yaml(text: str, source: str, way_out: str = _MEND) -> Any:
    """The content of a YAML text of up to 100,000 characters. Aliases, which can multiply it, are refused.

    Args:
        text: the text.
        source: its name in errors.

    Raises:
        InvalidFileError: it is not YAML, has an alias, or is longer.
    """
    if len(text) > _LONGEST_YAML:
        raise InvalidFileError(
            f"{source} has {len(text)} characters of YAML, {_LONGEST_YAML} are read at most: {way_out}."
        )
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidFileError(f"{source} is not YAML ({' '.join(str(error).split())}): {way_out}.") from error
    require_plain(content, source, way_out)
    return content


def read_front_matter(file: str | os.PathLike[str], way_out: str = _DOWNLOAD) -> tuple[dict[str, Any], str]:
    """The metadata in YAML at the beginning of a Markdown file, and the text behind it.

    Returns:
        The mapping, empty if there is none, and the text.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: the metadata is not a mapping in YAML, or the file cannot be read as text.
    """
    text = read_text(file, way_out)
    lines = text.lstrip().splitlines(keepends=True)
    fences = [number for number, line in enumerate(lines) if line.rstrip() == _FENCE]
    if len(fences) < 2 or fences[0] != 0:
        return {}, text
    metadata = parse_yaml("".join(lines[1 : fences[1]]), str(file), way_out) or {}
    if not isinstance(metadata, dict):
        raise InvalidFileError(
            f"{file} begins with a {type(metadata).__name__}, not with `name: value` lines: {way_out}."
        )
    return metadata, "".join(lines[fences[1] + 1 :])


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not supported: write its value out", event.start_mark
            )
        return super().compose_node(parent, index)


def _blobs(folder: Path) -> list[Path]:
    """The folders of the Hub's cache with a snapshot's content, if the given folder is part of a snapshot.

    They are the repository's own and, for content that Xet stores, one that all repositories share.
    """
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return [repository / "blobs", repository.parent / "blobs"]
    return []
