"""Options that several commands share, `--config`, and configuration fields as options."""

from __future__ import annotations

import argparse
import inspect
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command that leaves unknown options to [`parse_fields`]."""

_META = "peft_quant.config"
_FILLED_IN = {"base_fingerprint", "base_quantization", "peft_quant_version", "runtime_config"}  # set by the library


def _read_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """Use the keys of a YAML file as defaults of the command's options; other keys are left to [`parse_fields`].

    Raises:
        typer.BadParameter: not a YAML mapping, or an unknown key.
    """
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")  # the user's own file: also a pipe, or a link to anywhere
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text: {error}") from error
    content = _parse_yaml(text, str(file))
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{file} holds {content!r}: write options as `name: value`, one a line.")
    names = {
        spelling.lstrip("-").replace("-", "_"): parameter.name
        for parameter in ctx.command.params
        if parameter.name not in ("config", "help")
        for spelling in parameter.opts
    }
    given = {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}
    fields = {key: value for key, value in given.items() if key not in names}
    if fields and not ctx.allow_extra_args:
        raise typer.BadParameter(f"{file} has the key {', '.join(fields)}; known are {', '.join(sorted(names))}.")
    ctx.default_map = {
        names[key]: _pairs(value) if isinstance(value, dict) else value for key, value in given.items() if key in names
    }
    ctx.meta[_META] = fields
    return file


def _parse_yaml(text: str, source: str) -> Any:
    from ..reading import InvalidFileError, parse_yaml

    try:
        return parse_yaml(text, source)
    except InvalidFileError as error:
        raise typer.BadParameter(str(error)) from error


def _pairs(mapping: dict[Any, Any]) -> list[str]:
    """Entries as options take them: `NAME=VALUE`, or `OUTER:NAME=VALUE` for nested mappings."""
    pairs = []
    for name, value in mapping.items():
        pairs += [f"{name}:{pair}" for pair in _pairs(value)] if isinstance(value, dict) else [f"{name}={value}"]
    return pairs


def parse_fields(
    ctx: typer.Context, config_class: type[Any], arguments_class: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse the fields of a method's config and training arguments from the command line and the `--config` file.

    Training arguments are parsed by transformers' `HfArgumentParser`. It cannot parse the types of PEFT's configs, so
    their values are read as YAML: `--r 16`, `--target_modules '[q_proj, v_proj]'`, `--rank_pattern '{q_proj: 8}'`.

    Returns:
        Two dictionaries of values by name: the config's and the training arguments'.

    Raises:
        typer.BadParameter: an unknown option, or a value of the wrong type.
    """
    from peft import PeftConfig
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise typer.BadParameter(message)

    parser = Parser(arguments_class, add_help=False, allow_abbrev=False)
    filled_in = _FILLED_IN | inspect.signature(PeftConfig).parameters.keys()
    of_config = {
        name: parameter.default
        for name, parameter in inspect.signature(config_class).parameters.items()
        if name not in filled_in and parameter.kind is not parameter.VAR_KEYWORD
    }
    for name, default in of_config.items():
        flag: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(default, bool) else {}
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, type=_field_value, **flag)
    known = {action.dest for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS

    def refuse(name: str, where: str = "") -> None:
        close = get_close_matches(name.lstrip("-").replace("-", "_"), known, 3)
        hint = f": did you mean {' or '.join(close)}?" if close else "; see --help"
        raise typer.BadParameter(f"{name}{where} is unknown{hint}")

    in_file = ctx.meta.get(_META, {})
    for name in in_file:
        if name not in known:
            refuse(name, " in the file of --config")
    given = {name: value for name, value in in_file.items() if isinstance(value, (list, dict))}
    scalars = [f"--{name}={value}" for name, value in in_file.items() if name not in given]
    found, unknown = parser.parse_known_args([*scalars, *ctx.args])
    for token in unknown:
        refuse(token.partition("=")[0])
    given |= vars(found)
    return (
        {name: value for name, value in given.items() if name in of_config},
        {name: value for name, value in given.items() if name not in of_config},
    )


def _field_value(text: str) -> Any:
    value = _parse_yaml(text, repr(text))
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)  # YAML 1.1 reads 3e-4 as a string
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of options by name; the command line takes precedence.",
        is_eager=True,
        exists=True,
        dir_okay=False,
        callback=_read_config,
    ),
]

Column = Annotated[str, typer.Option(help="Text column of a data set or of a JSON, CSV or Parquet file.")]
Split = Annotated[str, typer.Option(help="Split of a data set, for instance 'train[:10%]'.")]
PushToHub = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Push the result to the Hub under this id.")]
TEXTS = "text file, JSON lines, CSV, Parquet, directory, or Hub id (user/data, user/data:config)"
