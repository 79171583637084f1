"""The rule that every fuzz target is held to.

A reader of other people's files may

- accept them;
- raise [`InvalidFileError`] or one of its subclasses;
- raise a `ValueError`, or an error that its target names, by a `raise` statement of this package: a message that was
  written for the user, not one that escaped from an operation;
- raise an error that its target leaves to another package, by a `raise` statement of that package.

It may take a second of processor time, open files of the directory it was given and of installed packages, and write
into that directory. Anything else is a [`BrokenRuleError`]: other errors, more time, other files, network, new
processes, unpickling of classes.
"""

from __future__ import annotations

import ast
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

import peft_quant
from peft_quant import InvalidFileError

from .edits import Edit, Files, write


PACKAGE = Path(peft_quant.__file__).resolve().parent
_PACKAGES = Path(torch.__file__).resolve().parents[1]
SECONDS = 1.0
"""Processor time that an input may take."""
_PATIENCE = 10.0  # seconds after which a call that waits is ended

_INSTALLED = (sys.prefix, sys.base_prefix, PACKAGE.parent, *filter(os.path.isabs, sys.path))
_READABLE = tuple(
    f"{os.path.realpath(path)}{os.sep}" for path in (*_INSTALLED, "/proc", "/sys", "/dev/null", "/dev/urandom")
)
# events, and which of their arguments are paths
_READS = {"open": (0,), "os.listdir": (0,), "os.scandir": (0,)}
_WRITES = {
    **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"), (0,)),
    **{"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,)},
}
_NEVER = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class"),
    *("socket.connect", "socket.getaddrinfo"),
}


class BrokenRuleError(AssertionError):
    """An input broke the rule.

    Attributes:
        kind: the error or what else happened, and where, the same for inputs that fail in the same way.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class _EndedError(BaseException):
    """Ends what takes too long or accesses what it must not; `except Exception` does not catch it."""


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Attributes:
        name: its name, and that of its directory in `corpus/`.
        read: called with a directory; reads everything in it.
        seed: returns the files of a valid directory.
        errors: documented errors besides `ValueError`, raised by this package.
        foreign: errors that other packages raise.
    """

    name: str
    read: Callable[[Path], Any]
    seed: Callable[[], Files]
    errors: tuple[type[Exception], ...] = ()
    foreign: tuple[type[Exception], ...] = ()

    @cached_property
    def files(self) -> Files:
        return self.seed()

    def check(self, edits: list[Edit]) -> bool:
        """Read an input; whether it was accepted.

        Raises:
            BrokenRuleError: the input broke the rule.
        """
        with _sandbox() as directory:
            write(self.files, edits, directory)
            return self._check(directory)

    def warm_up(self) -> None:
        """Read the valid directory, which imports and compiles what is needed, without a limit of time."""
        with _sandbox() as directory:
            write(self.files, [], directory)
            self.read(directory)

    def _check(self, directory: Path) -> bool:
        accepted, begin = False, time.process_time()
        with _watched(directory) as seen:
            try:
                self.read(directory)
                accepted = True
            except _EndedError as error:
                raise BrokenRuleError(f"{error.args[0]} in {_where(error)}", error.args[1]) from error
            except Exception as error:
                if not self._documents(error):
                    raise BrokenRuleError(f"{type(error).__name__} in {_where(error)}", str(error)) from error
        seconds = time.process_time() - begin
        if seen:
            raise BrokenRuleError(*seen[0])
        if seconds > SECONDS:
            raise BrokenRuleError("slow", f"it took {seconds:.1f} s of processor time")
        return accepted

    def _documents(self, error: Exception) -> bool:
        if isinstance(error, (InvalidFileError, ValueError, *self.errors)) and _is_raised_in(PACKAGE, error):
            return True
        return isinstance(error, self.foreign) and _is_raised_in(_PACKAGES, error)


def minimized(target: Target, edits: list[Edit], kind: str) -> list[Edit]:
    """The edits without those that a failure does not need, each with the simplest values that keep it."""

    def fails(edits: list[Edit]) -> bool:
        try:
            target.check(edits)
        except BrokenRuleError as error:
            return error.kind == kind
        return False

    position = 0
    while position < len(edits):
        without = [*edits[:position], *edits[position + 1 :]]
        if fails(without):
            edits = without
            continue
        *edit, value = edits[position]
        for simpler in (0, 1, 2, 100, "", "a", [], {}) if edit[0] in ("set", "grow", "splice") else ():
            changed = [*edits[:position], [*edit, simpler], *edits[position + 1 :]]
            if type(simpler) is type(value) and len(str(simpler)) < len(str(value)) and fails(changed):
                edits = changed
                break
        position += 1
    return edits


def _is_raised_in(directory: Path, error: BaseException) -> bool:
    """Whether the error comes from a `raise` statement of a file in the directory."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = frame.f_code.co_filename
    return Path(file).is_relative_to(directory) and line in _raising_lines(file)


@cache
def _raising_lines(file: str) -> frozenset[int]:
    raising = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Raise)]
    return frozenset(line for node in raising for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _where(error: BaseException) -> str:
    """The last function of the package that the error went through."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [code for code in frames if Path(code.co_filename).is_relative_to(PACKAGE)]
    code = (ours or frames)[-1]
    return f"{Path(code.co_filename).stem}.{code.co_name}"


_number = 0


@cache
def _root() -> Path:
    """A directory for the sandboxes of this process, in memory if possible, with a file that nothing may read."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None)).resolve()
    (root / "outside").mkdir()
    (root / "outside" / "secret").write_bytes(b"{}")
    return root


@contextmanager
def _sandbox() -> Iterator[Path]:
    """A new directory: digests of files are cached by path, size and time."""
    global _number
    _number += 1
    directory = _root() / str(_number)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def close() -> None:
    """Remove the sandboxes of this process."""
    shutil.rmtree(_root())
    _root.cache_clear()


_watching: tuple[str, list[tuple[str, str]]] | None = None


@contextmanager
def _watched(directory: Path) -> Iterator[list[tuple[str, str]]]:
    """End what takes too long or accesses what it must not, and collect the latter, in case the end is caught."""
    global _watching

    def end(*_: Any) -> None:
        raise _EndedError("hang", f"it was ended after {_PATIENCE:g} s")

    seen: list[tuple[str, str]] = []
    temporary, tempfile.tempdir = tempfile.tempdir, str(directory)
    place = Path.cwd()
    os.chdir(directory)
    before = signal.signal(signal.SIGALRM, end)
    logging.disable()
    gc.disable()  # a collection takes longer than most inputs
    _watching = f"{directory}{os.sep}", seen
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _watching = None
        gc.enable()
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGALRM, before)
        tempfile.tempdir = temporary
        os.chdir(place)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    within, seen = _watching
    if event in _NEVER:
        seen.append((event, str(arguments)[:200]))
        raise _EndedError(*seen[-1])
    writes = event in _WRITES or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
    allowed = (within,) if writes else (within, *_READABLE)
    for position in (_READS | _WRITES).get(event, ()):
        if not isinstance(arguments[position], (str, bytes)):  # a file descriptor
            continue
        parent, name = os.path.split(os.fsdecode(arguments[position]).rstrip(os.sep))
        path = os.path.realpath(parent or os.curdir) + os.sep + name  # of a link itself, if that is written
        path = f"{path if event in _WRITES else os.path.realpath(path)}{os.sep}"
        if not path.startswith(allowed) and "__pycache__" not in path:
            seen.append((f"{'write' if writes else 'read'} outside of the directory", f"{event} {path}"))
            raise _EndedError(*seen[-1])


sys.addaudithook(_audit)
