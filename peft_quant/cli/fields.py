"""Options that are fields of the library's configurations, under their own names."""

from __future__ import annotations

import argparse
import inspect
import json
from difflib import get_close_matches
from typing import Any

import typer

from .options import further_options


# what the library fills in
_FILLED_IN = {
    "auto_mapping",
    "base_fingerprint",
    "base_model_name_or_path",
    "base_quantization",
    "inference_mode",
    "peft_quant_version",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}


def parse_fields(
    ctx: typer.Context, config_class: type[Any], arguments_class: type[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a method's config and of its training arguments that were given, in `--config` or beside it.

    Training arguments are parsed by transformers' `HfArgumentParser`. Of PEFT's configs, whose types it cannot parse,
    every value is read as YAML: `--r 16`, `--target_modules '[q_proj, v_proj]'`, `--rank_pattern '{q_proj: 8}'`.

    Returns:
        Values by name, of the config and of the arguments.

    Raises:
        typer.BadParameter: an unknown option, or a value of another type.
    """
    parser = _parser(config_class, arguments_class)
    in_file, tokens = further_options(ctx)
    known = {action.dest for action in parser._actions}
    for name in in_file:
        if name not in known:
            raise typer.BadParameter(f"{name} in the file of --config is {_unknown(name, known)}")
    structured = {name: value for name, value in in_file.items() if isinstance(value, (list, dict))}
    scalars = {name: value for name, value in in_file.items() if name not in structured and value is not None}
    written = [
        f"--{name}={json.dumps(value) if isinstance(value, bool) else value}" for name, value in scalars.items()
    ]
    found, unknown = parser.parse_known_args([*written, *tokens])
    for token in unknown:
        name = token.partition("=")[0]
        raise typer.BadParameter(f"{name} is {_unknown(name.lstrip('-').replace('-', '_'), known)}")
    given = {**structured, **vars(found)}
    of_config = _fields_of(config_class)
    return (
        {name: value for name, value in given.items() if name in of_config},
        {name: value for name, value in given.items() if name not in of_config},
    )


def _parser(config_class: type[Any], arguments_class: Any) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise typer.BadParameter(message)

    parser = Parser(arguments_class, add_help=False, allow_abbrev=False)
    for name, default in _fields_of(config_class).items():
        options: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(default, bool) else {}
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, type=_yaml, **options)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _fields_of(config_class: type[Any]) -> dict[str, Any]:
    """Defaults of the fields that a user sets, by name."""
    parameters = inspect.signature(config_class).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in _FILLED_IN
    }


def _yaml(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not readable as YAML") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 3e-4 for a string
        except ValueError:
            pass
    return value


def _unknown(name: str, known: set[str]) -> str:
    close = get_close_matches(name, known, 3)
    return "unknown" + (f": did you mean {' or '.join(close)}?" if close else "; see --help")
