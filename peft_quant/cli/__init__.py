"""The command line: `peft-quant`, `python -m peft_quant`, `accelerate launch -m peft_quant`.

Each command is a function in the file of the same name and leaves the work to the library. At the top, files here
import only the standard library and typer, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..compat import __version__
from . import card, env, estimate, eval, inspect, merge, quantize, train
from .console import say
from .options import PASSED_ON


app = typer.Typer(
    name="peft-quant",
    help="Fine-tune large language models whose weights stay quantized: PEQA, LREC and QFT.",
    epilog="PEFT_QUANT_DEBUG=1 in the environment shows where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
app.command("estimate")(estimate.estimate)
app.command("quantize")(quantize.quantize)
app.command("train", context_settings=PASSED_ON)(train.train)
app.command("merge")(merge.merge)
app.command("eval")(eval.evaluate)
app.command("inspect")(inspect.inspect)
app.command("card")(card.card)
app.command("env")(env.env)

_INTERRUPTED = 130  # typer's exit code after Ctrl-C


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-quant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 1 after an error, 2 for wrong usage, 130 after Ctrl-C.

    Args:
        arguments: command-line arguments; by default, those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["correct"]:
        say("`peft-quant correct` is now `peft-quant train lrec --teacher`; it goes with the next release", error=True)
        words[:1] = ["train", "lrec"]
    try:
        app(words, prog_name="peft-quant")
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:
            say("interrupted: run it again; `quantize` and `train` resume with --resume", error=True)
        raise
    except Exception as error:
        if os.environ.get("PEFT_QUANT_DEBUG"):
            raise
        # messages of these errors are complete; those of others may need the type
        name = (
            "" if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) else f"{type(error).__name__}: "
        )
        typer.echo(f"error: {name}{' '.join(str(error).split())}", err=True)
        sys.exit(1)
