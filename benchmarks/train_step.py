"""Time and peak memory of one training step of a Llama with random weights.

    python benchmarks/train_step.py --method peqa lora --bits 4 --seq 2048 --checkpointing 0 1
    python benchmarks/train_step.py --method lora --peer peft bitsandbytes --compile default --liger
    python benchmarks/train_step.py --method qft-stack qft-fused --checkpointing 1
    python benchmarks/train_step.py --method full --peer bitsandbytes --optimizer lion8bit --in-backward

| method | what is trained |
|---|---|
| `peqa` | fp32 deltas of all scales; on gptqmodel's layers, the bf16 scales themselves |
| `lora` | PEFT's LoRA (fp32, autocast to bf16); ours on layers of `prepare_gptq_for_training` |
| `lrec` | the same shapes as `lora`, through `LRECConfig` |
| `qft-stack` | all parameters of an int8 model, with int8 gradients, clipped by their norm, and QuantizedLion |
| `qft-fused` | the same, each gradient used within backward |
| `full` | all parameters of a bf16 model |

`--peer` selects whose quantized layers to use: see `benchmarks/peers`. A peer that is not installed is skipped. With
several peers or methods, each runs in its own process.

A step is forward, backward, optimizer and zero_grad; medians over --steps times --repeat after three warm-up steps,
without synchronization between them. GB = 1e9 bytes. Times and peaks exclude loading.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from optimizers import OPTIMIZERS
from peers import METHODS


OWN_SETTINGS = ("compile", "liger", "recompute_pointwise", "max_fusion_buffers")
# before importing torch, as gptqmodel and unsloth set it: a tensor takes no more than its own bytes
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", nargs="+", choices=METHODS, default=["ours"])
    parser.add_argument(
        "--method", nargs="+", choices=dict.fromkeys(sum(METHODS.values(), ())), default=["peqa", "lora"]
    )
    parser.add_argument("--shape", choices=("tiny", "1b", "7b", "13b", "65b"), default="7b")
    parser.add_argument("--bits", type=int, default=4, help="of ours, gptqmodel and hqq")
    parser.add_argument("--group", type=int, default=128, help="of ours, gptqmodel and hqq; -1: one group")
    parser.add_argument("--rank", type=int, default=16, help="of lora and lrec")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--checkpointing", type=int, choices=(0, 1), nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="measure so many times --steps steps")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="8 bits: bitsandbytes' or torchao's; QFT has its own"
    )
    parser.add_argument(
        "--in-backward", action="store_true", help="step each parameter within backward, and keep no gradient"
    )
    parser.add_argument(
        "--compile", choices=("default", "reduce-overhead"), help="compile each decoder layer and the loss"
    )
    parser.add_argument(
        "--correction",
        action="store_true",
        help="DistillationTrainer's loss: KL from 64 cached log-probabilities",
    )
    parser.add_argument("--liger", action="store_true", help="Liger's loss, which never holds the logits")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="kept activations go to CPU memory (TRL's OffloadActivations; unsloth's own)",
    )
    parser.add_argument(
        "--recompute-pointwise",
        action="store_true",
        help="with --compile: recompute all cheap results in backward, however far from their use",
    )
    parser.add_argument(
        "--max-fusion-buffers", type=int, help="with --compile: tensors a fused kernel may read and write (Inductor's)"
    )
    parser.add_argument("--profile", action="store_true", help="on a GPU: print afterwards what its time went to")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser


def as_options(parser: argparse.ArgumentParser, arguments: dict[str, object]) -> list[str]:
    """The equivalent command line, without defaults."""
    options = []
    for name, value in arguments.items():
        if value != parser.get_default(name):
            options.append("--" + name.replace("_", "-"))
            if value is not True:
                options += [str(item) for item in (value if isinstance(value, list) else [value])]
    return options


def measure_cells(arguments: argparse.Namespace) -> None:
    """Measure the cells of one peer and one method in this process."""
    peer = importlib.import_module(f"peers.{arguments.peer}")  # before torch, because unsloth patches other packages
    import torch
    from measure import measure

    for checkpointing in arguments.checkpointing:
        cell = argparse.Namespace(**{**vars(arguments), "checkpointing": checkpointing})
        try:
            measure(cell, peer.build)
        except torch.OutOfMemoryError as error:
            print(f"{cell.peer} {cell.method}, checkpointing {checkpointing}: {error!r}", flush=True)


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    if "unsloth" in arguments.peer and any(getattr(arguments, name) for name in OWN_SETTINGS):
        parser.error("unsloth brings its own: leave out --" + ", --".join(OWN_SETTINGS).replace("_", "-"))
    if arguments.correction and arguments.liger:
        parser.error("--correction needs the logits, which --liger never makes: leave out one")
    cells = []
    for peer in arguments.peer:
        if peer != "ours" and importlib.util.find_spec(peer) is None:
            print(f"{peer}: not installed, skipped", flush=True)
            continue
        for method in arguments.method:
            if method in METHODS[peer]:
                cells.append((peer, method))
            else:
                print(f"{peer}: has no {method}, skipped", flush=True)
    if len(cells) == 1:
        arguments.peer, arguments.method = cells[0]
        measure_cells(arguments)
        return
    failed = []
    for peer, method in cells:
        options = as_options(parser, {**vars(arguments), "peer": [peer], "method": [method]})
        if subprocess.run([sys.executable, sys.argv[0], *options]).returncode:
            failed.append(f"{peer} {method}")
    if failed:
        sys.exit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
