"""`peft-quant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import prepare, say
from .options import TEXTS, Column, Config, Split


def quantize(
    model: Annotated[str, typer.Argument(help="Float model, with its tokenizer: directory or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, which must not exist.")],
    calibration: Annotated[str, typer.Option(help=f"Text like what the model will be used on: {TEXTS}.")],
    column: Column = "text",
    split: Split = "train",
    samples: Annotated[int, typer.Option(min=1, help="Windows to calibrate on, spread evenly over the text.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    bits: Annotated[int, typer.Option(help="Bits per weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="In-features that share a scale; -1 for one scale per output channel.")
    ] = 128,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Give each group its own zero point (gptq_v2 format).")
    ] = False,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="Quantize columns by decreasing activation (desc_act).")
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Name or name suffix of layers to leave in float; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the layers in OUT.unfinished; repeat the other options.")
    ] = False,
    config: Config = None,
) -> None:
    """Quantize a float model to a GPTQ checkpoint.

    Uses transformers, optimum and gptqmodel, with the float model in memory in fp32.

    Until OUT is complete, finished layers are kept in OUT.unfinished, about one byte per weight. After Ctrl-C, repeat
    the command with --resume.
    """
    prepare()
    import torch

    from ..evaluation.loading import load_tokenizer
    from ..evaluation.text import read_texts, token_windows
    from ..files import refuse_existing
    from ..gptq.quantize import quantize_checkpoint
    from ..gptq.quantize_resume import count_finished, state_beside

    refuse_existing(out)
    state = state_beside(out)
    if state.exists() and not resume:
        raise FileExistsError(f"{state} is of a run that was interrupted: resume it with --resume, or remove it.")
    if resume:
        if not state.exists():
            raise FileNotFoundError(f"{state} does not exist, so there is nothing to resume: leave out --resume.")
        done, layers = count_finished(state)
        say(f"resuming from {state}, which has {done} of {layers} layers")
    torch._dynamo.config.disable = True  # otherwise gptqmodel compiles every layer at its first forward
    tokenizer = load_tokenizer(model)
    windows = token_windows(read_texts(calibration, column, split), tokenizer, sequence_length, samples)
    try:
        quantize_checkpoint(
            model,
            out,
            tokenizer.batch_decode(windows["input_ids"][:]),
            bits=bits,
            group_size=group_size,
            symmetric=not asymmetric,
            act_order=act_order,
            exclude=exclude or (),
            state=state,
        )
    except KeyboardInterrupt:
        if state.exists():
            done, layers = count_finished(state)
            say(f"stopped after {done} of {layers} layers, which are in {state}", error=True)
        raise
    say(f"{model} in {bits} bits is in {out}, calibrated on {len(windows)} windows of {sequence_length} tokens")
