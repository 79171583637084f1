"""`peft-quant eval`."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import typer

from ..tables import markdown_table
from .console import prepare, say
from .options import TEXTS, Column, Config


class Dtype(str, Enum):
    """Dtype of the arithmetic and of the weights that are not quantized."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Float, GPTQ or int8 checkpoints, or adapters (on the base they name): directories or Hub ids.",
        ),
    ],
    data: Annotated[str, typer.Option(help=f"Text to evaluate on: {TEXTS}.")],
    column: Column = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "test",
    dtype: Annotated[
        list[Dtype],
        typer.Option(help="Dtype to evaluate in; may be repeated. Engines serve in fp16 or bf16."),
    ] = [Dtype.fp32],  # noqa: B006
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Number of windows, spread evenly over the text; all by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    config: Config = None,
) -> None:
    """Measure the perplexity of models, in fp32 or in the dtype they are served in.

    GPTQ checkpoints run on gptqmodel's torch kernel, adapters on the layers they were trained with.
    """
    prepare()
    import torch

    from ..evaluation.loading import load_model, load_tokenizer
    from ..evaluation.perplexity import perplexity
    from ..evaluation.text import read_texts, token_windows

    torch._dynamo.config.disable = True  # otherwise gptqmodel compiles every layer at its first forward
    dtypes = {Dtype.fp32: torch.float32, Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}
    texts = read_texts(data, column, split)
    rows: list[dict[str, Any]] = []
    for name in models:
        cut = token_windows(texts, load_tokenizer(name), sequence_length, windows)
        tokens = torch.tensor(cut["input_ids"][:])
        for chosen in dtype:
            model = load_model(name, dtype=dtypes[chosen])
            value = perplexity(model, tokens, batch_size=batch_size, description=f"{name}, {chosen.value}")
            rows.append({"model": name, "dtype": chosen.value, "perplexity": value, "tokens": tokens[:, 1:].numel()})
            del model
    if as_json:
        say(json.dumps({"data": data, "sequence_length": sequence_length, "results": rows}, indent=2))
    else:
        say(markdown_table(["model", "dtype", "perplexity", "tokens"], [[*row.values()] for row in rows]))
