"""Packed products on a CPU, compared with `nn.Linear` and gptqmodel's layers in the same run.

    python benchmarks/cpu.py --out benchmarks/results

The contestants take turns, in a different order each round, because each one finds the caches as the previous one left
them; times are medians. gptqmodel's inference kernels compute in bf16. Decoding is compared with copying the dense
weight.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import append
from torch import nn

from peft_quant import ops
from peft_quant.ops.packed.packing import pack_zeros


try:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.nn_modules.qlinear.torch_fused import TorchFusedLinear
except ImportError:
    TRAINING_PEERS = INFERENCE_PEERS = ()
else:
    TRAINING_PEERS = (TorchLinear,)
    INFERENCE_PEERS = (TorchAtenLinear, TorchFusedLinear)

SIZE = 2048
FORMATS = ((4, 128), (2, 128), (3, 128), (8, 128), (4, 32), (4, SIZE))


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each contestant."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 3):
        for name, run in random.sample(list(contestants.items()), len(contestants)):
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def random_weight(bits: int, group_size: int) -> ops.PackedWeight:
    """A random symmetric weight in the `gptq_v2` format."""
    groups = SIZE // group_size
    qweight = torch.randint(-(2**31), 2**31 - 1, (SIZE * bits // 32, SIZE), dtype=torch.int32)
    qzeros = pack_zeros(torch.full((groups, SIZE), 1 << (bits - 1)), bits, 0)
    scales = torch.rand(groups, SIZE).mul_(0.01).add_(1e-3).half()
    return ops.PackedWeight(qweight, qzeros, scales, None, bits, group_size, 0)


def peer_layer(kind: type[nn.Module], weight: ops.PackedWeight) -> nn.Module:
    layer = kind(
        bits=4,
        group_size=128,
        sym=True,
        desc_act=False,
        in_features=SIZE,
        out_features=SIZE,
        bias=False,
        register_buffers=True,
    )
    for name in ("qweight", "qzeros", "scales"):
        setattr(layer, name, getattr(weight, name).clone())
    layer.g_idx = (torch.arange(SIZE) // 128).int()
    layer.optimized = True  # not compiled
    layer.post_init()
    return layer


def forward_backward(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> None:
    x.grad = None
    forward(x).backward(dy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def report(
        op: str,
        tokens: int | None,
        contestants: dict[tuple[str, int, int], Callable[[], object]],
        rounds: int,
        dtype: str = "float32",
    ) -> None:
        times = medians({str(key): run for key, run in contestants.items()}, rounds)
        dense = next(us for key, us in times.items() if "dense" in key)
        for key in contestants:
            peer, bits, group = key
            us = times[str(key)]
            cell = {"bits": bits, "group": group or None, "M": tokens, "K": SIZE, "N": SIZE, "dtype": dtype}
            append("kernels", arguments.out, op=op, peer=peer, us=round(us, 1), **cell)
            print(
                f"{op:17} M={tokens or '':<4} {dtype:8} {peer:16} b={bits:<3} group={group:<5} {us:9.0f} us"
                f" = {us / dense:.2f} dense"
            )

    dense = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    layers = {cell: random_weight(*cell) for cell in FORMATS}
    ours = {cell: lambda x, weight=weight: ops.linear(x, weight) for cell, weight in layers.items()}

    for tokens, rounds in ((512, 15), (64, 40)):
        x = torch.randn(tokens, SIZE, requires_grad=True)
        dy = torch.randn(tokens, SIZE)
        contestants = {("dense", 32, 0): dense}
        contestants |= {("ours", *cell): forward for cell, forward in ours.items()}
        contestants |= {(kind.__name__, 4, 128): peer_layer(kind, layers[4, 128]).train() for kind in TRAINING_PEERS}
        runs = {key: lambda f=forward, x=x, dy=dy: forward_backward(f, x, dy) for key, forward in contestants.items()}
        report("forward+backward", tokens, runs, rounds)

    with torch.no_grad():
        contestants = {("dense", 32, 0): dense.weight.clone}
        contestants |= {
            ("ours", *cell): lambda weight=weight: ops.dequantize(weight, torch.float32)
            for cell, weight in layers.items()
        }
        report("dequantize", None, contestants, 40)

        x = torch.randn(1, SIZE)
        contestants = {("dense", 32, 0): dense}
        contestants |= {("ours", *cell): forward for cell, forward in ours.items()}
        contestants |= {(kind.__name__, 4, 128): peer_layer(kind, layers[4, 128]).eval() for kind in INFERENCE_PEERS}
        report("linear", 1, {key: lambda f=forward: f(x) for key, forward in contestants.items()}, 300)

        x = x.bfloat16()
        contestants |= {("dense", 16, 0): dense.bfloat16()}
        del contestants["dense", 32, 0]
        runs = {key: lambda f=forward: f(x) for key, forward in contestants.items()}
        report("linear", 1, runs, 300, dtype="bfloat16")


if __name__ == "__main__":
    main()
