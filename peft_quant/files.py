"""Files and directories that are there whole or not at all."""

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
    """Write a file that takes the place of `path` once it is complete.

    Yields a temporary path beside it, whose file is removed if an error is raised.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def require_space(path: str | os.PathLike[str], needed: int, what: str, way_out: str) -> None:
    """Check that a disk has room.

    Args:
        path: what is to be written, which need not exist.
        needed: bytes.
        what: is written, as the error names it.
        way_out: what to do without the room.

    Raises:
        OSError: it has not.
    """
    target = Path(path).absolute()
    existing = next(directory for directory in (target, *target.parents) if directory.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"{what} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. {way_out}"
        raise OSError(errno.ENOSPC, message, os.fspath(path))


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
