"""Fuzzes every target with coverage guidance: `python tests/fuzz/run.py --inputs 100000 [TARGET ...]`.

A process per target, on all cores. atheris mutates bytes and keeps those that reach new code of the package;
hypothesis decodes them to edits of files. Without atheris, the bytes are random. Prints a table, writes the shortest
input found for each kind of failure to `tests/fuzz/corpus/TARGET/`, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
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


class Run:
    """A target's inputs, counted.

    Attributes:
        counts: numbers of inputs that were accepted, refused, and that failed.
        failures: the shortest input of each kind of failure, and its message.
        slowest: seconds of the slowest input.
    """

    def __init__(self, target: Any) -> None:
        from fuzz.edits import inputs
        from hypothesis import HealthCheck, given, settings

        self.target = target
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, tuple[list[Any], str]] = {}
        self.slowest = 0.0

        @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(inputs(target.files))
        def test(edits: list[Any]) -> None:
            self._read(edits)

        self.decode: Callable[[bytes], Any] = test.hypothesis.fuzz_one_input

    def _read(self, edits: list[Any]) -> None:
        from fuzz.harness import BrokenRuleError

        begin = time.perf_counter()
        try:
            outcome = "accepted" if self.target.check(edits) else "refused"
        except BrokenRuleError as failure:
            outcome = "failures"
            known = self.failures.get(failure.kind)
            if known is None or len(edits) < len(known[0]):
                self.failures[failure.kind] = edits, str(failure)
        self.slowest = max(self.slowest, time.perf_counter() - begin)
        self.counts[outcome] += 1

    def report(self) -> dict[str, Any]:
        from fuzz.harness import minimized

        found = {
            kind: {"edits": minimized(self.target, edits, kind), "message": message}
            for kind, (edits, message) in self.failures.items()
        }
        return {**self.counts, "kinds": found, "slowest": self.slowest}


def fuzz(name: str, number: int, report: Path) -> None:
    """Fuzz one target in this process, and end the process."""
    instrumented = atheris.instrument_imports(include=["peft_quant"]) if atheris else nullcontext()
    with instrumented:
        from fuzz.harness import close
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    target.warm_up()
    run = Run(target)

    def end() -> None:
        report.write_text(json.dumps(run.report()))
        close()
        os._exit(0)

    def read(content: bytes) -> None:
        run.decode(content)
        if run.counts.total() >= number:
            end()

    generator = random.Random(name)
    if atheris is None:
        while True:
            read(generator.randbytes(_BYTES))
    with tempfile.TemporaryDirectory() as seeds:
        for seed in range(_SEEDS):
            Path(seeds, str(seed)).write_bytes(generator.randbytes(_BYTES))
        # no timer of its own: the rule has one, which names the input
        options = [f"-max_len={_BYTES}", "-len_control=0", "-timeout=0", "-rss_limit_mb=0", "-verbosity=0"]
        atheris.Setup([name, *options, "-seed=1", seeds], read)
        atheris.Fuzz()


def fuzz_apart(name: str, number: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        report, log = Path(directory, "report"), Path(directory, "log")
        with log.open("wb") as stream:
            command = [sys.executable, __file__, "--inputs", str(number), "--report", str(report), name]
            status = subprocess.run(command, stdout=stream, stderr=stream).returncode
        if not report.exists():
            end = log.read_text(errors="replace")[-2000:]
            return {"failures": 1, "kinds": {}, "slowest": 0.0, "crash": f"{name} ended with status {status}:\n{end}"}
        return json.loads(report.read_text())


def keep(name: str, kind: str, edits: list[Any]) -> Path:
    """Write an input to the corpus."""
    file = HERE / "corpus" / name / f"{re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(edit)}\n" for edit in edits))
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs per target")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRITON_INTERPRET": "1"}
    if given.report is not None:
        fuzz(given.targets[0], given.inputs, given.report)
    from fuzz.targets import TARGETS

    print("guided by coverage, by atheris" if atheris else "atheris is not installed: inputs are random, unguided")
    print(f"{'target':<24} {'inputs':>8} {'accepted':>8} {'refused':>8} {'failures':>8} {'slowest ms':>10}")
    failed = False
    with ThreadPoolExecutor(given.processes) as pool:
        names = given.targets or list(TARGETS)
        for name, found in zip(names, pool.map(fuzz_apart, names, [given.inputs] * len(names))):
            counts = [found.get(outcome, 0) for outcome in ("accepted", "refused", "failures")]
            columns = (sum(counts), *counts, round(1000 * found["slowest"]))
            print(f"{name:<24}" + "".join(f" {column:>{width}}" for column, width in zip(columns, (8, 8, 8, 8, 10))))
            for kind, failure in found["kinds"].items():
                print(f"  {failure['message'][:200]}\n    {keep(name, kind, failure['edits'])}")
            print(found.get("crash", ""), end="", flush=True)
            failed |= bool(counts[2])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
