"""Console output: printed once per run, and without the noise of other packages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import redirect_stdout, suppress

import typer


_CHATTER = {
    "TOKENIZERS_PARALLELISM": "false",
    "GPTQMODEL_DISABLE_GIL_WARNING": "1",
    "GPTQMODEL_DISABLE_PACK_EXT": "1",  # otherwise the first packing compiles C++ for a minute
}


def prepare() -> None:
    """Register the methods and silence other packages; commands that load models call it first."""
    quiet()
    from .. import register_methods

    register_methods()


def quiet() -> None:
    """Silence what other packages print at import."""
    for name, value in _CHATTER.items():
        os.environ.setdefault(name, value)
    for name in ("torchao", "torch.utils._pytree", "torch.distributed.elastic", "optimum"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)  # done on purpose
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with redirect_stdout(sys.stderr), suppress(ImportError):
        from logbar import LogBar  # a dependency of gptqmodel

        LogBar.shared().setLevel("ERROR")


def is_first_process() -> bool:
    """Whether this is the first of the processes that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, *, error: bool = False) -> None:
    """Print a line, from the first process only."""
    if is_first_process():
        typer.echo(text, err=error)
