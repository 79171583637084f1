"""Packed operators on a GPU, compared with copy bandwidth and bf16 products in the same run.

    python benchmarks/operators.py --out benchmarks/results

Times are medians of `triton.testing.do_bench`; with one to 32 tokens, of CUDA graphs, because launches would take
longer than the work. Bytes are the least that an operator must move. `share_of_copy` is relative to the speed of a
large copy; a row `copy` with a shape copies as many bytes as the decoding in the row above moves. Rows named int8 are
QFT's, on a weight `[N, K]`; `--qft` measures only these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from record import append, device_name
from triton.testing import do_bench, do_bench_cudagraph

from peft_quant import ops
from peft_quant.ops.packed import operators


try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))


def microseconds(function: Callable[..., object], *arguments: object) -> float:
    function(*arguments)
    return do_bench(lambda: function(*arguments), warmup=20, rep=60, return_mode="median") * 1e3


def graph_microseconds(function: Callable[..., object], *arguments: object) -> float:
    return do_bench_cudagraph(lambda: function(*arguments), rep=20, return_mode="median") * 1e3


def decoded_product(x: torch.Tensor, weight: ops.PackedWeight) -> torch.Tensor:
    return x @ ops.dequantize(weight, x.dtype)


def random_weight(bits: int, rows: int, columns: int, group_size: int) -> ops.PackedWeight:
    groups = rows // group_size

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")

    scales = torch.rand(groups, columns, device="cuda").mul_(0.01).add_(1e-3).half()
    qweight, qzeros = words(rows * bits // 32, columns), words(groups, columns * bits // 32)
    return ops.PackedWeight(qweight, qzeros, scales, None, bits, group_size, 1)


def qft_rows(report: Callable[..., None], out_features: int, in_features: int) -> None:
    """Measure decoding, encoding and Lion on one weight, and bitsandbytes' Lion8bit for comparison."""
    cell = {"bits": 8, "K": in_features, "N": out_features}
    weight = torch.randn(out_features, in_features, device="cuda") * 0.02
    gradient = torch.randn_like(weight).bfloat16()
    n = weight.numel()

    for outliers in (round(0.01 * in_features), 0):
        parts = ops.encode_weight(weight, outliers)
        moved = n * 2 + sum(part.nbytes for part in parts if part is not None)
        us = microseconds(ops.decode_weight, parts, torch.bfloat16)
        report("int8_decode" if outliers else "int8_decode, no outliers", "ours", us, moved, **cell)
    codes, scales, _ = ops.encode_gradient(gradient, 0)
    report("int8_encode", "ours", microseconds(ops.encode_gradient, gradient, 0), n * 3 + scales.nbytes * 2, **cell)
    us = microseconds(ops.accumulate_gradient, codes, scales, gradient, 0)
    report("int8_accumulate", "ours", us, n * 4 + scales.nbytes * 3, **cell)
    report("norm", "torch", microseconds(torch.linalg.vector_norm, gradient), n * 2, **cell)

    norm, skipped = torch.ones((), device="cuda"), torch.zeros((), dtype=torch.int32, device="cuda")
    momentum, momentum_scales, _ = ops.encode_gradient(torch.randn_like(weight), 1)
    options = (norm, skipped, 1.0, 1e-5, 0.9, 0.99, 0.1)
    state = (momentum, momentum_scales)
    for name, (w, w_scales), (g, g_scales), rounding in (
        ("int8_lion", parts[:2], (codes, scales), ops.STOCHASTIC),
        ("int8_lion, fused", parts[:2], (gradient, None), ops.STOCHASTIC),
        ("int8_lion, nearest", parts[:2], (codes, scales), ops.NEAREST),
        ("int8_lion, error feedback", parts[:2], (codes, scales), ops.ERROR_FEEDBACK),
        ("bf16_lion", (weight.bfloat16(), None), (codes, scales), ops.STOCHASTIC),
    ):
        residual = ops.random_residual(w, 0) if rounding == ops.ERROR_FEEDBACK else None
        written = [w, *state, *([] if residual is None else [residual])]
        read = [t for t in (w_scales, g, g_scales) if t is not None]
        moved = 2 * sum(t.nbytes for t in written) + sum(t.nbytes for t in read)
        step = ops.LionStep(w, w_scales, g, g_scales, *state, residual, *options, rounding, 0)
        us = microseconds(ops.lion_step, step)
        report(name, "ours", us, moved, **cell)

    if bitsandbytes is not None:
        parameter = torch.nn.Parameter(weight.bfloat16())
        parameter.grad = gradient
        lion = bitsandbytes.optim.Lion8bit([parameter], lr=1e-5)
        # weight and momentum are read and written, the gradient is read; momentum has one scale per 256 elements
        report("lion", "bitsandbytes", microseconds(lion.step), n * 8 + n // 256 * 8, **cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--qft", action="store_true", help="only the operators of QFT")
    arguments = parser.parse_args()

    source = torch.empty(2**30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * 2**30 / microseconds(target.copy_, source) / 1e3
    print(f"{device_name()}: copy {copy:.0f} GB/s", flush=True)

    def report(op: str, peer: str, us: float, moved: float | None = None, **row: object) -> None:
        bandwidth = {} if moved is None else {"gb_per_s": round(moved / us / 1e3, 1)}
        if bandwidth:
            bandwidth["share_of_copy"] = round(bandwidth["gb_per_s"] / copy, 3)
        append("kernels", arguments.out, op=op, peer=peer, us=round(us, 2), dtype="bfloat16", **row, **bandwidth)
        print(f"{op:26} {peer:10} {row} {us:8.1f} us {bandwidth}", flush=True)

    report("copy", "torch", 2 * 2**30 / copy / 1e3, 2 * 2**30)
    for in_features, out_features in SHAPES:
        qft_rows(report, out_features, in_features)
    for rows, columns in () if arguments.qft else SHAPES:
        for bits, group in ((2, 128), (3, 128), (4, 128), (8, 128), (4, 32), (4, rows)):
            weight = random_weight(bits, rows, columns, group)
            cell = {"bits": bits, "group": group, "K": rows, "N": columns}
            moved = sum(t.nbytes for t in weight[:3]) + rows * columns * 2
            us = microseconds(ops.dequantize, weight, torch.bfloat16)
            report("dequantize", "ours", us, moved, **cell)
        us = microseconds(target[: moved // 2].copy_, source[: moved // 2])
        report("copy", "torch", us, moved, K=rows, N=columns)
        g_idx = (torch.arange(rows, device="cuda") // 128)[torch.randperm(rows, device="cuda")].int()
        for bits in (2, 3, 4, 8):
            weight = random_weight(bits, rows, columns, 128)._replace(g_idx=g_idx)
            moved = sum(t.nbytes for t in weight[:3]) + rows * columns * 2
            us = microseconds(ops.dequantize, weight, torch.bfloat16)
            report("dequantize act-order", "ours", us, moved, bits=bits, group=128, K=rows, N=columns)

        for tokens in (1, 8, 32):
            x = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
            for bits in (2, 3, 4, 8):
                weight = random_weight(bits, rows, columns, 128)
                cell = {"M": tokens, "K": rows, "N": columns, "bits": bits, "group": 128}
                us = graph_microseconds(operators.linear, x, weight)
                report("linear", "ours", us, **cell)
                us = graph_microseconds(decoded_product, x, weight)
                report("linear, decoded", "ours", us, **cell)

        for tokens in (512, 2048, 8192):
            x = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            dense = torch.randn(columns, rows, device="cuda", dtype=torch.bfloat16)
            cell = {"M": tokens, "K": rows, "N": columns}
            report("linear", "bf16", microseconds(torch.nn.functional.linear, x, dense), **cell)
            report("grad_x", "bf16", microseconds(torch.matmul, dy, dense), **cell)
            report("grad_weight", "bf16", microseconds(torch.matmul, x.t(), dy), **cell)
            for bits in (3, 4):
                weight = random_weight(bits, rows, columns, 128)
                cell |= {"bits": bits, "group": 128}
                report("linear", "ours", microseconds(operators.linear, x, weight), **cell)
                report("grad_x", "ours", microseconds(operators.linear_grad_x, dy, weight), **cell)
                us = microseconds(operators.linear_grad_scales, x, dy, *weight[:2], *weight[3:])
                report("grad_scales", "ours", us, **cell)
            us = microseconds(operators.linear_grad_scales, x, dy, *weight[:2], g_idx, *weight[4:])
            report("grad_scales act-order", "ours", us, **cell)


if __name__ == "__main__":
    main()
