"""Run the tests of the Triton kernels under NVIDIA's compute-sanitizer (part of the CUDA toolkit); needs a GPU.

    python tests/ops/sanitize.py [--tools memcheck racecheck] [pytest options]

Every tensor has an allocation of its own, so that an access behind its end is seen. Each tool must first find a fault
planted in a kernel of this file; then it must find none in ours.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
import triton.language as tl


TESTS = ("packed/test_triton.py", "int8/test_triton.py", "test_hostile.py")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@triton.jit
def _write_behind_the_end(out_ptr, elements):
    tl.store(out_ptr + elements + tl.arange(0, 128), 1.0)


@triton.jit
def _read_behind_the_end(out_ptr, elements):
    tl.store(out_ptr + tl.arange(0, 128), tl.load(out_ptr + elements + tl.arange(0, 128)))


def plant(kernel: str) -> None:
    out = torch.zeros(128, device="cuda")
    globals()[kernel][(1,)](out, out.numel())
    torch.cuda.synchronize()


def run(tool: str, *command: str) -> tuple[int, int, str]:
    """Errors that a tool found in a command, the command's exit status, and what they printed."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = ("compute-sanitizer", "--tool", tool, *(["--padding", "512"] if tool == "memcheck" else []))
    done = subprocess.run(
        [*sanitizer, sys.executable, *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    counts = [int(count) for count in SUMMARY.findall(done.stdout)]
    if not counts:
        sys.exit(f"compute-sanitizer printed no summary:\n{done.stdout[-4000:]}")
    return sum(counts), done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck", "synccheck"])
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    options, pytest_options = parser.parse_known_args()
    if options.plant:
        plant(options.plant)
        return
    for kernel in ("_write_behind_the_end", "_read_behind_the_end"):
        if not run("memcheck", __file__, "--plant", kernel)[0]:
            sys.exit(f"memcheck did not find the fault planted in {kernel}.")
    tests = [str(Path(__file__).parent / name) for name in TESTS]
    failed = False
    for tool in options.tools:
        start = time.monotonic()
        errors, status, output = run(tool, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *pytest_options)
        passed = re.findall(r"\d+ passed.*", output)
        print(
            f"{tool}: {errors} errors; pytest: {passed[-1] if passed else status}; {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if errors or status:
            failed = True
            print(output[-8000:])
    sys.exit(failed)


if __name__ == "__main__":
    main()
