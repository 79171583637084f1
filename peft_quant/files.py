"""Writing of whole files and directories: a process that is killed, or a full disk, leaves the old ones or the new.

What is written lies in a temporary directory on the same disk, `.NAME.xxxxxxxx.partial`, until it is complete and has
reached the disk. The next writer of the same name removes what killed processes left. To tell these directories from
those of live processes, each is locked, and the system releases a process's locks when it ends. Where there are no
such locks, as on Windows, nothing is removed.
"""

from __future__ import annotations

import errno
import filecmp
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = re.compile(r"\..*\.\w{8}\.partial", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the messages of safetensors


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file that replaces `path` once it is complete.

    Yields a temporary path, whose file is removed if an error is raised.

    Raises:
        OSError: the directory cannot be written, or there is no room left.
    """
    target = Path(path)
    with temporary_directory(target.parent, target.name, target) as directory:
        temporary = directory / target.name
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)


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
        FileExistsError: `path` exists already, or another process writes it.
        OSError: its parent cannot be written, or there is no room left.
    """
    target = refuse_existing(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(target.parent, target.name, target, alone=True) as temporary:
        yield temporary
        _sync_all(temporary)
        if not _rename(temporary, target):
            raise FileExistsError(f"{target} was written by another process in the meantime: that one stays.")


@contextmanager
def replaced_files(path: str | os.PathLike[str], key: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Fill a directory whose files appear once all of them are complete, in place of those of the same name.

    Yields a temporary directory. If an error is raised while it is filled, all old files stay. If several files
    change, `key` is removed before and appears after all others: a process that is killed between them leaves a
    directory that nothing loads, rather than files of two saves, and the rest of the new files in
    `.save.xxxxxxxx.partial` in it. The same holds in each subdirectory.

    Args:
        path: the directory, which need not exist.
        key: name of the file without which nothing in a directory is loaded, as `config.json`.
        stale: patterns of files that replace each other, as weights in one file and in several: if some are written,
            the others are removed.

    Raises:
        NotADirectoryError: `path` is a file.
        OSError: it cannot be written, or there is no room left.
    """
    target = Path(path)
    if _TEMPORARY.fullmatch(target.name):  # of a save that this one is a part of
        yield target
        return
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: choose another directory.")
    exists = target.is_dir()
    target.parent.mkdir(parents=True, exist_ok=True)
    place = (target, "save") if exists else (target.parent, target.name)  # `target` may be a disk of its own
    with temporary_directory(*place, target) as temporary:
        yield temporary
        _sync_all(temporary)
        if exists or not _rename(temporary, target):
            with _locked(target, wait=True):
                _move_files(temporary, target, key, stale)


@contextmanager
def temporary_directory(parent: Path, name: str, target: Path, *, alone: bool = False) -> Iterator[Path]:
    """Context with a new directory `.NAME.xxxxxxxx.partial`, which is removed at the end if it is still there.

    Args:
        parent: where to create it.
        name: its name.
        target: what it is for, named in errors.
        alone: whether no other process may have one of the same name.

    Raises:
        FileExistsError: another process has one.
        OSError: `parent` cannot be written, or there is no room left.
    """
    if _remove_left_over(parent, name) and alone:
        raise FileExistsError(f"{target} is being written by another process: choose another directory.")
    with ExitStack() as locks:
        directory = None
        while directory is None or not directory.exists():  # before it was locked, another process may have removed it
            try:
                directory = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent))
            except OSError as error:
                message = f"{os.strerror(error.errno or 0)}: {target} cannot be written. Choose another directory"
                raise OSError(error.errno, message, os.fspath(parent)) from error
            locks.enter_context(_locked(directory, wait=True))
        try:
            yield directory
        except Exception as error:
            found = _OS_ERROR.search(str(error))
            number = error.errno if isinstance(error, OSError) else found and int(found[1])
            if number not in _NO_ROOM:
                raise
            message = f"{os.strerror(number)}: nothing was changed. Make room, or choose another directory"
            raise OSError(number, message, os.fspath(target)) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Context that one process at a time can enter for a directory.

    Raises:
        BlockingIOError: another process is in it.
    """
    with _locked(directory, wait=False) as held:
        if held is False:
            raise BlockingIOError(f"{directory} is being written by another process: wait for its end, or stop it.")
        yield


def _move_files(source: Path, target: Path, key: str, stale: Sequence[str]) -> None:
    def is_stale(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in stale)

    target.mkdir(exist_ok=True)
    names = []
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _move_files(entry, target / entry.name, key, stale)
        else:
            names.append(entry.name)
    if key in names:
        left = []
        if any(map(is_stale, names)):
            left = [file for file in target.iterdir() if is_stale(file.name) and file.name not in names]
        if len(left) + sum(not _same(source / name, target / name) for name in names) > 1:
            (target / key).unlink(missing_ok=True)
        for file in left:
            file.unlink()
    for name in sorted(names, key=lambda name: name == key):
        (source / name).replace(target / name)
    _sync(target)


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def _rename(directory: Path, target: Path) -> bool:
    """Rename a directory, unless there is something else under the new name. Returns whether it did."""
    directory.chmod(0o777 & ~_umask())
    try:
        directory.rename(target)
    except OSError:
        if not target.exists():
            raise
        return False
    _sync(target.parent)
    return True


def _remove_left_over(parent: Path, name: str) -> bool:
    """Remove the temporary directories that killed processes left. Returns whether a live process has one."""
    live = False
    for directory in parent.glob(f".{glob.escape(name)}.????????.partial"):
        with _locked(directory, wait=False) as held:
            if held:
                shutil.rmtree(directory, ignore_errors=True)
            live |= held is False
    return live


@contextmanager
def _locked(directory: Path, *, wait: bool) -> Iterator[bool | None]:
    """Lock a directory until the context or the process ends.

    Yields whether it is locked by this call (or, without `wait`, by another one); None where there are no locks.
    """
    held, descriptor = None, None
    try:
        with suppress(OSError):  # Windows and some network file systems
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held = True
            except BlockingIOError:
                held = False
        yield held
    finally:
        if descriptor is not None:
            if held:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # or it would last as long as processes forked meanwhile
            os.close(descriptor)


def _sync_all(directory: Path) -> None:
    for place, _, names in os.walk(directory):
        for name in names:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    """Write a file, or the names in a directory, to the disk, so that they survive a power cut."""
    if os.name == "nt":  # syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
