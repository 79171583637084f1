"""Options that commands have in common, and what `--config` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command whose further options are for others to parse."""

_META = "peft_quant.config"


def _read_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """Make the keys of a YAML file defaults of the command's options.

    Keys are the options' names, with hyphens or underscores. A command with `PASSED_ON` gets the others by
    [`further_options`].

    Raises:
        typer.BadParameter: not a YAML mapping, or an unknown key.
    """
    if file is None:
        return None
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{file} holds {content!r}: write options as `name: value`, one a line.")
    names = {
        _as_key(spelling): parameter.name
        for parameter in ctx.command.params
        if parameter.name not in ("config", "help")
        for spelling in parameter.opts
    }
    given = {_as_key(str(key)): value for key, value in content.items()}
    further = {key: value for key, value in given.items() if key not in names}
    if further and not ctx.allow_extra_args:
        raise typer.BadParameter(f"{file} has the key {', '.join(further)}; known are {', '.join(sorted(names))}.")
    own = {key: value for key, value in given.items() if key in names and value is not None}
    ctx.default_map = {names[key]: _pairs(value) if isinstance(value, dict) else value for key, value in own.items()}
    ctx.meta[_META] = further
    return file


def _as_key(spelling: str) -> str:
    return spelling.lstrip("-").replace("-", "_")


def _pairs(mapping: dict[Any, Any]) -> list[str]:
    """`NAME=VALUE` of every entry, as options take them; `OUTER:NAME=VALUE` of mappings of mappings."""
    pairs = []
    for name, value in mapping.items():
        inner = [f"{name}:{pair}" for pair in _pairs(value)] if isinstance(value, dict) else [f"{name}={value}"]
        pairs += inner
    return pairs


def further_options(ctx: typer.Context) -> tuple[dict[str, Any], list[str]]:
    """What was given beside the command's own options: by key in the file, and as it stood on the command line."""
    return ctx.meta.get(_META, {}), ctx.args


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of options, by their names; those on the command line win.",
        is_eager=True,
        exists=True,
        dir_okay=False,
        callback=_read_config,
    ),
]

Column = Annotated[str, typer.Option(help="Column of the texts, of a data set or a JSON, CSV or Parquet file.")]
Split = Annotated[str, typer.Option(help="Split of a data set, for instance 'train[:10%]'.")]
PushToHub = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Push the result to the Hub, under this id.")]
TEXTS = "text file, JSON lines, CSV, Parquet, directory, or Hub id (user/data, user/data:config)"
