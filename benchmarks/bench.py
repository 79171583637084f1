"""Measures the cells of the documentation's table one after another, then prints the table and draws the plot.

    python benchmarks/bench.py --only "--peer (ours|peft)" --deadline 500
    python benchmarks/bench.py --deadline 0      # lists the cells
    python benchmarks/bench.py -- --shape tiny   # options for every cell, here for a machine without a GPU

Every cell is a call of `train_step.py` in its own process. Cells that failed (exit code 1) or did not fit into the
deadline are listed at the end.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import plot
import table


LEAN = "--liger"
FAST = f"{LEAN} --compile default --recompute-pointwise"
LEANEST = f"{FAST} --max-fusion-buffers 5"
GRAPHS = FAST.replace("default", "reduce-overhead")
ADAM8 = "--optimizer adamw8bit"
FULL = f"--checkpointing 1 {LEAN}"
CORRECTION = "--bits 2 --rank 32 --seq 512 --checkpointing 1"
CELLS = (
    # the 7B shape, 1 x 2048 tokens
    f"--peer ours --method lrec {FAST} {ADAM8}",
    f"--peer ours --method lrec {GRAPHS} {ADAM8}",
    f"--peer ours --method lrec {GRAPHS}",
    f"--peer ours --method lrec --checkpointing 1 {FAST}",
    f"--peer ours --method lrec --checkpointing 0 {GRAPHS} --optimizer torchao-adamw8bit",
    f"--peer ours --method lrec --checkpointing 1 {FAST} --optimizer torchao-adamw8bit",
    f"--peer ours --method peqa {FAST}",
    f"--peer ours --method peqa {FAST} {ADAM8}",
    f"--peer ours --method peqa --checkpointing 0 {GRAPHS}",
    f"--peer ours --method lora {FAST} {ADAM8}",
    f"--peer ours --method lora --checkpointing 0 {GRAPHS}",
    f"--peer unsloth --method lora --checkpointing 0 {ADAM8}",
    f"--peer unsloth --method lora --checkpointing 1 {ADAM8}",
    "--peer unsloth --method lora --checkpointing 0",
    f"--peer peft --method lora {FAST} {ADAM8}",
    f"--peer bitsandbytes --method lora {FAST} {ADAM8}",
    f"--peer gptqmodel --method lora {LEAN} {ADAM8}",
    f"--peer gptqmodel --method peqa {LEAN}",
    f"--peer hqq --method lora --checkpointing 0 {LEAN} {ADAM8}",
    f"--peer hqq --method lora --checkpointing 1 {LEAN} {ADAM8}",
    # saved activations in CPU memory
    f"--peer ours --method lrec --checkpointing 1 --offload {FAST} {ADAM8}",
    f"--peer unsloth --method lora --checkpointing 1 --offload {ADAM8}",
    # fused kernels with fewer live tensors
    f"--peer ours --method lrec --checkpointing 1 {LEANEST} {ADAM8}",
    f"--peer ours --method lrec --checkpointing 1 --offload {LEANEST} {ADAM8}",
    f"--peer ours --method lrec --bits 2 --checkpointing 1 {LEANEST} {ADAM8}",
    # fewer bits
    f"--peer ours --method lrec --bits 2 --checkpointing 1 {FAST} {ADAM8}",
    f"--peer ours --method peqa --bits 3 --checkpointing 0 {FAST}",
    # 1 x 512 tokens
    f"--peer ours --method lrec --seq 512 --checkpointing 0 {GRAPHS} {ADAM8}",
    f"--peer ours --method lrec --seq 512 --checkpointing 0 {GRAPHS}",
    f"--peer ours --method lrec --seq 512 --checkpointing 0 {GRAPHS} --optimizer torchao-adamw8bit",
    f"--peer unsloth --method lora --seq 512 --checkpointing 0 {ADAM8}",
    f"--peer bitsandbytes --method lora --seq 512 --checkpointing 0 {FAST} {ADAM8}",
    # a distillation step of LREC
    f"--peer ours --method lrec --correction {CORRECTION} --compile default --recompute-pointwise {ADAM8}",
    f"--peer gptqmodel --method lora {CORRECTION} {LEAN} {ADAM8}",
    # full fine-tuning, 1 x 2048 tokens
    f"--peer ours --method qft-stack --checkpointing 1 {FAST}",
    f"--peer ours --method qft-fused --checkpointing 1 {FAST}",
    f"--peer ours --method qft-stack {FULL}",
    f"--peer ours --method qft-fused {FULL}",
    f"--peer torch --method full {FULL}",
    f"--peer torch --method full {FULL} --optimizer sgd --in-backward",
    f"--peer bitsandbytes --method full {FULL} {ADAM8}",
    f"--peer bitsandbytes --method full {FULL} --optimizer lion8bit",
    f"--peer bitsandbytes --method full {FULL} --optimizer lion8bit --in-backward",
    f"--peer torch --method full --checkpointing 1 {FAST}",
    f"--peer torch --method full --checkpointing 1 {FAST} --optimizer sgd --in-backward",
    f"--peer torch --method full --checkpointing 1 {FAST} --optimizer torchao-adamw8bit",
    f"--peer bitsandbytes --method full --checkpointing 1 {FAST} {ADAM8}",
    f"--peer bitsandbytes --method full --checkpointing 1 {FAST} --optimizer lion8bit",
    f"--peer bitsandbytes --method full --checkpointing 1 {FAST} --optimizer lion8bit --in-backward",
    # the 65B shape
    f"--peer ours --method peqa --shape 65b --group -1 --checkpointing 1 {FAST}",
    # without compilation, with PyTorch's loss
    "--peer ours --method peqa",
    "--peer ours --method lora",
    "--peer ours --method lrec",
    f"--peer ours --method lrec --checkpointing 1 {ADAM8}",
    "--peer peft --method lora",
    # compared with the memory estimate
    *(
        f"--peer {peer} --method {method} --shape {shape} --checkpointing 1"
        for shape in ("1b", "7b", "13b")
        for peer, method in (
            ("ours", "peqa"),
            ("ours", "lrec"),
            ("ours", "qft-stack"),
            ("ours", "qft-fused"),
            ("peft", "lora"),
            ("bitsandbytes", "lora"),
        )
    ),
    "--peer ours --method peqa --shape 1b --checkpointing 0",
    "--peer ours --method lrec --shape 1b --checkpointing 0",
    "--peer ours --method lrec --shape 1b --checkpointing 1 --batch 4",
)
SHORTEST = 20  # seconds that any cell takes at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="cells whose options match")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds for all cells")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("options", nargs="*", help="further options of train_step.py, after --")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.deadline
    script = os.path.relpath(Path(__file__).with_name("train_step.py"))
    failed, no_time = [], []
    for cell in filter(arguments.only.search, CELLS):
        left = end - time.monotonic()
        if left < SHORTEST:
            no_time.append(f"no time: {cell}")
            continue
        print(f"# {cell}", flush=True)
        start = time.monotonic()
        command = [sys.executable, script, *cell.split(), *arguments.options, "--out", str(arguments.out)]
        try:
            code = subprocess.run(command, timeout=None if math.isinf(left) else left).returncode
            if code:
                failed.append(f"exit code {code}: {cell}")
        except subprocess.TimeoutExpired:
            no_time.append(f"stopped at the deadline: {cell}")
        print(f"# {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(failed + no_time), flush=True)
    if (arguments.out / "train_step.csv").exists():
        table.show(arguments.out)
        plot.draw_speed(arguments.out)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
