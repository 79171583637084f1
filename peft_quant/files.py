"""Atomic writing of files and directories."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file that replaces `path` once it is complete.

    Yields a temporary path next to it, whose file is removed if an error is raised.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def require_space(path: str | os.PathLike[str], needed: int, what: str, way_out: str) -> None:
    """Check that a disk has enough free space.

    Args:
        path: file or directory to be written, which need not exist.
        needed: number of bytes.
        what: name of what is written, for the error message.
        way_out: advice at the end of the error message.

    Raises:
        OSError: there is not enough space.
    """
    target = Path(path).absolute()
    existing = next(directory for directory in (target, *target.parents) if directory.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"{what} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. {way_out}"
        raise OSError(errno.ENOSPC, message, os.fspath(path))


def refuse_existing(path: str | os.PathLike[str]) -> Path:
    """Return `path` if nothing exists there.

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

    Yields a temporary directory next to `path`, renamed to it at the end and removed if an error is raised.

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
    """Fill a directory whose files appear, each atomically, once all of them are complete.

    Yields a temporary directory next to `path`, which is renamed if `path` does not exist. Otherwise its files replace
    those of the same name; if an error is raised while it is filled, all old files stay.

    Args:
        path: the directory.
        stale: glob pattern of the files to replace; matching files that were not written again are removed.
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
