"""`peft-quant inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import quiet, say
from .options import Config


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="PATH_OR_ID", help="GPTQ checkpoint or adapter: directory or Hub id.")
    ],
    base: Annotated[
        str | None, typer.Option(help="GPTQ checkpoint of the adapter; changes are shown relative to it.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another adapter to compare with.")] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="PNG file to write: a heat map of the changes of all layers.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print a row for every layer, which downloads weights from the Hub.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    config: Config = None,
) -> None:
    """Describe a checkpoint or an adapter: its format, the engines that serve it, how far each layer moved.

    Exits with 1 if a checkpoint is damaged.
    """
    quiet()
    from .. import inspection

    if not inspection.is_adapter(what):
        for option, value in (("--base", base), ("--compare", compare), ("--plot", plot)):
            if value is not None:
                raise typer.BadParameter(f"{what} is a checkpoint, and {option} is for adapters.")
        _inspect_checkpoint(what, layers, as_json)
        return
    if compare is None:
        found = inspection.inspect_adapter(what, base)
        sides = [found]
        say(_json(found) if as_json else f"{found}\n\n{found.layer_table()}" if layers else str(found))
    else:
        both = inspection.compare_adapters(what, compare, base)
        sides = [both.first, both.second]
        say(_json(both) if as_json else str(both))
    if plot is not None:
        from .. import plot_layer_changes

        names = [Path(side.path).name for side in sides]
        plot_layer_changes(
            sides[0].changes,
            plot,
            other=sides[1].changes if len(sides) == 2 else None,
            titles=names if len(set(names)) == 2 else [side.path for side in sides],
        )
        say(f"\nplotted in {plot}", error=as_json)


def _inspect_checkpoint(what: str, layers: bool, as_json: bool) -> None:
    from ..inspection import inspect_checkpoint

    found = inspect_checkpoint(what, statistics=True if layers else None)
    say(_json(found) if as_json else f"{found}\n\n{found.layer_table()}" if layers else str(found))
    if found.errors:
        raise typer.Exit(1)


def _json(found: Any) -> str:
    return json.dumps(asdict(found), indent=2)
