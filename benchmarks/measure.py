"""Measures one cell: times and peak memory of a few training steps."""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from optimizers import make_optimizer
from random_llama import SHAPES, VOCABULARY
from record import append, versions
from torch import nn

from peft_quant import Int8Weight
from peft_quant.trainers.distillation.loss import IGNORED, distillation_loss, top_k


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 3
# bits and group size of each peer that ignores --bits and --group
FORMATS = {"peft": (16, None), "bitsandbytes": (4, 64), "unsloth": (4, 64)}
# bits and group size of the parameters in full fine-tuning
WHOLE = {"full": (16, None), "qft-stack": (8, -1), "qft-fused": (8, -1)}


def mark() -> Any:
    """A timestamp in the device's queue of work."""
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if DEVICE == "cpu" else start.elapsed_time(end)


def allocated(model: nn.Module) -> int:
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    return sum(map(size, [*model.parameters(), *model.buffers()]))


def size(tensor: torch.Tensor) -> int:
    return tensor.bytes_held if isinstance(tensor, Int8Weight) else tensor.numel() * tensor.element_size()


def prepare(model: nn.Module, cell: argparse.Namespace) -> None:
    """Set up checkpointing, Liger's loss and compilation as the cell's options say."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if cell.checkpointing and cell.peer != "unsloth":
        # blocks use no randomness, so no random state has to be saved
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if cell.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        others = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, model=base, **others)
    if cell.recompute_pointwise:
        torch._functorch.config.ban_recompute_materialized_backward = False
        torch._functorch.config.ban_recompute_used_far_apart = False
    if cell.max_fusion_buffers:
        torch._inductor.config.max_fusion_unique_io_buffers = cell.max_fusion_buffers
    if cell.compile:
        if not cell.liger and not cell.correction:
            base.loss_function = torch.compile(base.loss_function)
        layers = base.model.layers
        options = {"fullgraph": cell.peer in ("ours", "peft"), "mode": cell.compile}
        for i, block in enumerate(layers):
            # With checkpointing outside the compiled code, offloading sees only the inputs of blocks, not packed
            # weights; and before PyTorch 2.13 checkpointing inside it does not recompute third-party Functions.
            if cell.offload or cell.peer not in ("ours", "peft"):
                block.forward = torch.compile(block.forward, **options)
            else:
                layers[i] = torch.compile(block, **options)


def offloading(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context in which activations saved in forward are moved to CPU memory, and back for backward."""
    if DEVICE == "cpu":
        return contextlib.nullcontext()
    from trl.models.activation_offloading import OffloadActivations

    context = OffloadActivations(max_fwd_stash_size=1)
    context.update_model_params(model)
    return context


def peak_bytes(cell: argparse.Namespace) -> int | None:
    """Peak of allocated memory; with CUDA graphs, whose memory does not count as allocated, of reserved memory."""
    if DEVICE == "cpu":
        return None
    if cell.compile == "reduce-overhead":
        return torch.cuda.max_memory_reserved()
    return torch.cuda.max_memory_allocated()


def measure(cell: argparse.Namespace, build: Callable[[argparse.Namespace, str], nn.Module]) -> None:
    """Append the cell's row to `train_step.csv`.

    Args:
        cell: the options of `train_step.py`, with one peer, one method and one value of checkpointing.
        build: the peer's `build`.
    """
    if cell.profile and DEVICE == "cpu":
        sys.exit("--profile needs a GPU")
    torch.manual_seed(0)
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    model = build(cell, DEVICE).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    gc.collect()
    # for adapters the base only, otherwise the whole model
    model_bytes = allocated(model) - (0 if cell.method in WHOLE else sum(map(size, trainable)))
    prepare(model, cell)
    optimizer = make_optimizer(cell, trainable)
    offload = offloading(model) if cell.offload and cell.peer != "unsloth" else contextlib.nullcontext()
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=cell.method not in ("peqa", *WHOLE))
    ids = torch.randint(0, VOCABULARY, (cell.batch, cell.seq), device=DEVICE)
    taught = top_k(torch.randn(ids.numel(), VOCABULARY, device=DEVICE), 64) if cell.correction else None

    def compute_loss() -> torch.Tensor:
        if not cell.correction:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        logits = model(input_ids=ids, use_cache=False).logits
        return distillation_loss(logits, targets, taught).loss / (cell.batch * (cell.seq - 1))

    def step() -> list[Any]:
        marks = [mark()]
        with autocast, offload:
            loss = compute_loss()
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        optimizer.step()
        optimizer.zero_grad()
        return [*marks, mark()]

    for _ in range(WARM_UP):
        step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    points = []
    for _ in range(cell.repeat):
        synchronize()
        points += [step() for _ in range(cell.steps)]
    synchronize()
    steps = [[milliseconds(*pair) for pair in pairwise(marks)] for marks in points]
    forward, backward, update = (statistics.median(times) for times in zip(*steps))
    bits, group = WHOLE.get(cell.method) or FORMATS.get(cell.peer, (cell.bits, cell.group))
    peak = peak_bytes(cell)
    row = {
        "method": cell.method,
        "peer": cell.peer,
        "bits": bits,
        "group": group,
        "layers": SHAPES[cell.shape]["num_hidden_layers"],
        "batch": cell.batch,
        "seq": cell.seq,
        "checkpointing": cell.checkpointing,
        "step_ms": round(statistics.median(sum(times) for times in steps), 1),
        "fwd_ms": round(forward, 1),
        "bwd_ms": round(backward, 1),
        "opt_ms": round(update, 1),
        "peak_gb": None if peak is None else round(peak / 1e9, 2),
        "model_gb": round(model_bytes / 1e9, 2),
    }
    append("train_step", cell.out, **row, versions=versions(*packages(cell)))
    print(row, flush=True)
    if cell.profile:
        profile(step)


def profile(step: Callable[[], Any], steps: int = 3, rows: int = 30) -> None:
    """Print a profile of a step, on the GPU and on the host."""
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter() - start
    synchronize()
    wall = time.perf_counter() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    launches = sum(event.count for event in kernels)
    print(f"a step: host {host / steps * 1e3:.1f} ms, wall {wall / steps * 1e3:.1f} ms, ", end="")
    print(f"GPU busy {busy / steps:.1f} ms with {launches // steps} kernels")
    for event in kernels[:rows]:
        print(f"{event.self_device_time_total / steps / 1e3:8.2f} ms {event.count // steps:6} x {event.key[:100]}")


def packages(cell: argparse.Namespace) -> list[str]:
    used = {cell.peer} - {"ours", "peft", "torch"}
    used |= {"liger-kernel"} if cell.liger else set()
    if cell.optimizer.endswith("8bit"):
        used.add("torchao" if cell.optimizer.startswith("torchao") else "bitsandbytes")
    used |= {"trl"} if cell.offload and cell.peer != "unsloth" else set()
    return sorted(used)
