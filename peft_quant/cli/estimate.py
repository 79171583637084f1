"""`peft-quant estimate`."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Literal

import typer

from ..tables import markdown_table
from .console import prepare, say
from .options import Config


class Method(str, Enum):
    """What is trained, and the format of the frozen weights."""

    peqa = "peqa"
    lrec = "lrec"
    qft_stack = "qft-stack"
    qft_fused = "qft-fused"
    lora = "lora"
    qlora = "qlora"


def _read_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", text, re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r}: write the memory of the GPU as 24GB.")
    return int(float(found[1]) * 1e9)


def estimate(
    model: Annotated[str, typer.Argument(help="Directory, config.json or Hub id; only the config is read.")],
    method: Annotated[
        list[Method],
        typer.Option(help="PEQA, LREC, QFT with gradients stacked or fused, LoRA on bf16 weights, QLoRA."),
    ] = list(Method),  # noqa: B006
    bits: Annotated[
        int | None, typer.Option(help="Per GPTQ weight: 2, 3, 4 or 8. Default: from a GPTQ config, else 4.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Of GPTQ weights; -1: one group. Default: from a GPTQ config, else 128.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of lrec, lora and qlora.")] = 16,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Sequences per forward pass.")] = 1,
    sequence: Annotated[
        int, typer.Option("--sequence", "--sequence-length", min=1, help="Tokens per sequence.")
    ] = 2048,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations in backward.")
    ] = True,
    optimizer: Annotated[Literal["adamw", "adamw8bit"], typer.Option(help="For adapters; QFT has its own.")] = "adamw",
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            metavar="GB", parser=_read_bytes, help="GPU memory, such as 24GB: also print the largest batch that fits."
        ),
    ] = None,
    card: Annotated[
        int | None, typer.Option(hidden=True, parser=_read_bytes, help="Old name of --gpu-memory.")
    ] = None,
    config: Config = None,
) -> None:
    """Estimate the GPU memory of a training step, without downloading weights.

    A GB is 1e9 bytes. The peak is that of tensors: the CUDA context, cuBLAS's workspace and memory that PyTorch
    reserves but does not use come on top. A batch that fits 24GB leaves them the rest of a card's 24 GiB.
    """
    if card is not None:
        say("--card is now --gpu-memory; --card goes with the next release", error=True)
        gpu_memory = card
    prepare()
    from ..estimate import KINDS, Estimate
    from ..model_config import read_model_config

    model_config = read_model_config(model)
    columns: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(chosen.value for chosen in method):
        counted = Estimate(
            model_config,
            name,
            bits=bits,
            group_size=group_size,
            rank=rank,
            sequence=sequence,
            checkpointing=checkpointing,
            optimizer=optimizer,
        )
        report = counted.report(batch)
        sizes = {row.what: row.bytes for row in report.rows}
        sizes |= {"not at the peak": -report.apart, "peak": report.total}
        column = {what: f"{size / 1e9:.2f}" for what, size in sizes.items() if size}
        if gpu_memory is not None:
            column["largest batch"] = str(counted.largest_batch(gpu_memory))
        columns[f"{name}, {counted.bits} bits"] = column
    kinds = [*KINDS, "not at the peak", "peak", "largest batch"]
    rows = [[kind, *(column.get(kind, "") for column in columns.values())] for kind in kinds]
    say(markdown_table([f"GB, {batch} x {sequence} tokens", *columns], [row for row in rows if any(row[1:])]))
