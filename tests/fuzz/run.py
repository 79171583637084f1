"""Fuzzes every target with coverage guidance: `python tests/fuzz/run.py --inputs 100000 [TARGET ...]`.

A process for each part of a target's inputs, on all cores. atheris mutates bytes and keeps those that reach new code
of the package; hypothesis decodes them to edits of files. Without atheris, the bytes are random. Prints a table,
writes the shortest input found for each kind of failure to `tests/fuzz/corpus/TARGET/`, and exits with 1 if there is
one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE.parent / "helpers")]
sys.dont_write_bytecode = True

try:
    import atheris
except ImportError:
    atheris = None

_BYTES = 2048  # of an input; hypothesis decodes a prefix
_SEEDS = 64
_PART = 25_000  # inputs of a process
_STUCK = 60  # seconds after which a process that its own timer could not stop is ended
_MEMORY = 4 << 30  # bytes that inputs may take
_SHOWN = 1_000  # characters of a message
_REPORT, _CURRENT, _LOG = "report", "current", "log"


class Run:
    """Inputs of a target, read and counted.

    Attributes:
        counts: numbers of inputs that were accepted, refused, and that failed.
        failures: the shortest input of each kind of failure, and its message.
        slowest: seconds of the slowest input.
    """

    def __init__(self, target: Any, current: Path) -> None:
        from fuzz.edits import inputs
        from hypothesis import HealthCheck, given, settings

        self.counts: Counter[str] = Counter()
        self.failures: dict[str, tuple[list[Any], str]] = {}
        self.slowest = 0.0
        self._target, self._current = target, current

        @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(inputs(target.files))
        def test(edits: list[Any]) -> None:
            self._read(edits)

        self.decode: Callable[[bytes], Any] = test.hypothesis.fuzz_one_input

    def _read(self, edits: list[Any]) -> None:
        from fuzz.harness import BrokenRuleError

        self._current.write_text(to_text(edits))
        faulthandler.dump_traceback_later(_STUCK, exit=True)
        begin = time.perf_counter()
        try:
            outcome = "accepted" if self._target.check(edits) else "refused"
        except BrokenRuleError as error:
            outcome = "failures"
            known = self.failures.get(error.kind)
            if known is None or len(edits) < len(known[0]):
                self.failures[error.kind] = edits, str(error)
        self.slowest = max(self.slowest, time.perf_counter() - begin)
        self.counts[outcome] += 1

    def report(self) -> dict[str, Any]:
        from fuzz.harness import minimized

        failures = [
            [kind, message, to_text(minimized(self._target, edits, kind))]
            for kind, (edits, message) in self.failures.items()
        ]
        return {"counts": self.counts, "slowest": self.slowest, "failures": failures}


def to_text(edits: list[Any]) -> str:
    """An input as in the corpus: a line of JSON per edit."""
    return "".join(f"{json.dumps(edit)}\n" for edit in edits)


def fuzz(name: str, number: int, part: int, directory: Path) -> None:
    """Fuzz one target in this process, write the report to a directory, and end the process."""
    with atheris.instrument_imports(include=["peft_quant"]) if atheris else nullcontext():
        from fuzz.harness import close
        from fuzz.targets import TARGETS
    TARGETS[name].warm_up()
    run = Run(TARGETS[name], directory / _CURRENT)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))

    def read(content: bytes) -> None:
        run.decode(content)
        if run.counts.total() >= number:
            faulthandler.cancel_dump_traceback_later()
            (directory / _REPORT).write_text(json.dumps(run.report()))
            close()
            os._exit(0)

    generator = random.Random(f"{name} {part}")
    while atheris is None:
        read(generator.randbytes(_BYTES))
    seeds = directory / "seeds"
    seeds.mkdir()
    for seed in range(_SEEDS):
        (seeds / str(seed)).write_bytes(generator.randbytes(_BYTES))
    # inputs stay as long as they are, to be mutated further; the timer is ours, which names the input
    options = [f"-max_len={_BYTES}", "-len_control=0", "-reduce_inputs=0", "-timeout=0", "-rss_limit_mb=0"]
    atheris.Setup([name, *options, f"-seed={part + 1}", str(seeds)], read)
    atheris.Fuzz()


def fuzz_apart(name: str, number: int, part: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        with (directory / _LOG).open("wb") as log:
            options = ["--inputs", str(number), "--part", str(part), "--directory", place]
            status = subprocess.run([sys.executable, __file__, *options, name], stdout=log, stderr=log).returncode
        if (directory / _REPORT).exists():
            return json.loads((directory / _REPORT).read_text())
        end = (directory / _LOG).read_text(errors="replace")[-_SHOWN:]
        current = directory / _CURRENT
        failure = [f"process ended with {status}", end, current.read_text() if current.exists() else ""]
        return {"counts": {"failures": 1}, "slowest": 0.0, "failures": [failure]}


def keep(name: str, kind: str, edits: str) -> Path:
    """Write an input to the corpus."""
    title = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    file = HERE / "corpus" / name / f"{title}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(edits)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs per target")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet = {"GPTQMODEL_DISABLE_PACK_EXT": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **quiet}
    if given.directory is not None:
        fuzz(given.targets[0], given.inputs, given.part, given.directory)
    from fuzz.targets import TARGETS

    print("guided by coverage, by atheris" if atheris else "atheris is not installed: inputs are random, unguided")
    print(
        f"{'target':<24} {'inputs':>8} {'accepted':>8} {'refused':>8} {'failures':>8} {'slowest ms':>10}", flush=True
    )
    sizes, failed = [min(_PART, given.inputs - done) for done in range(0, given.inputs, _PART)], False
    with ThreadPoolExecutor(given.processes) as pool:
        started = {
            name: [pool.submit(fuzz_apart, name, size, part) for part, size in enumerate(sizes)]
            for name in given.targets or TARGETS
        }
        for name, parts in started.items():
            found = [part.result() for part in parts]
            counts = sum((Counter(part["counts"]) for part in found), Counter())
            numbers = (counts.total(), *(counts[outcome] for outcome in ("accepted", "refused", "failures")))
            columns = " ".join(f"{number:>8}" for number in numbers)
            print(f"{name:<24} {columns} {1000 * max(part['slowest'] for part in found):>10.0f}", flush=True)
            failures = {kind: (message, edits) for part in found for kind, message, edits in part["failures"]}
            for kind, (message, edits) in failures.items():
                print(f"  {message[:_SHOWN]}\n  {keep(name, kind, edits)}", flush=True)
            failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
