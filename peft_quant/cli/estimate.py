"""`peft-quant estimate`."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise typer.BadParameter(f"{text!r}: write the memory as 24GB.")
    return int(float(found[1]) * 1e9)


def estimate(
    model: Annotated[str, typer.Argument(help="Directory, config.json or Hub id. Only the config is read.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="peqa, lrec, qft-stack, qft-fused, lora (bf16) or qlora; all of them by default."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Of GPTQ weights: 2, 3, 4 or 8. Default: the config's, or 4.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Of GPTQ weights; -1: one group. Default: the config's, or 128.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of lrec, lora and qlora.")] = 16,
    batch: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing.")
    ] = True,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit; qft has its own.")] = "adamw",
    card: Annotated[
        str | None, typer.Option(help="Memory of a GPU, as 24GB (of 1e9 bytes): also tell the largest batch that fits.")
    ] = None,
) -> None:
    """Will it fit? The memory of a training step, by what takes it, before anything is downloaded."""
    memory = None if card is None else _bytes(card)
    with redirect_stdout(sys.stderr):  # packages greet
        from ..estimate import KINDS, METHODS, Estimate, read_config

        config = read_config(model)
        columns = {}
        for name in dict.fromkeys(method or METHODS):
            counted = Estimate(
                config,
                name,
                bits=bits,
                group_size=group_size,
                rank=rank,
                sequence=sequence,
                checkpointing=checkpointing,
                optimizer=optimizer,
            )
            report = counted.report(batch)
            column = {row.what: _gigabytes(row.bytes) for row in report.rows}
            column |= {"not at the peak": _gigabytes(-report.apart), "peak": _gigabytes(report.total)}
            if memory is not None:
                column["largest batch"] = str(counted.largest_batch(memory))
            columns[f"{name}, {counted.bits} bits"] = column
    typer.echo(f"| GB, {batch} x {sequence} tokens | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
    for what in (*KINDS, "not at the peak", "peak", "largest batch"):
        cells = [column.get(what, "") for column in columns.values()]
        if any(cells):
            typer.echo(f"| {what} | " + " | ".join(cells) + " |")
    typer.echo(
        "\nGB of 1e9 bytes, at the peak of what tensors hold. The CUDA context, cuBLAS's workspace and what the allocator "
        "keeps but does not use come on top."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}" if size else ""
