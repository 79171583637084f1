"""`peft-quant card`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import prepare, say
from .options import Config


Texts = list[str] | None


def card(
    directory: Annotated[Path, typer.Argument(help="Directory of an adapter, a merged checkpoint or an int8 model.")],
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base, if the adapter does not name one.")
    ] = None,
    repository: Annotated[str | None, typer.Option(help="Hub id of this model, for the snippets.")] = None,
    license: Annotated[str | None, typer.Option(help="License, as the Hub spells it, such as apache-2.0.")] = None,
    language: Annotated[Texts, typer.Option(help="Language code; may be repeated.")] = None,
    datasets: Annotated[Texts, typer.Option(help="Hub id of a training data set; may be repeated.")] = None,
    tags: Annotated[Texts, typer.Option("--tag", help="Additional tag; may be repeated.")] = None,
    settings: Annotated[
        Texts, typer.Option("--setting", metavar="NAME=VALUE", help="Training setting; may be repeated.")
    ] = None,
    command: Annotated[str | None, typer.Option(help="The training command.")] = None,
    perplexity: Annotated[
        Texts, typer.Option(metavar="TEXT=VALUE", help="Perplexity of this model on a text; may be repeated.")
    ] = None,
    compared_with: Annotated[
        Texts, typer.Option(metavar="MODEL:TEXT=VALUE", help="Perplexity of another model on a text; may be repeated.")
    ] = None,
    config: Config = None,
) -> None:
    """Write a model card, or add facts that only you know to an existing one.

    Your own text is kept. So are facts added earlier, until the weights change.
    """
    prepare()
    from ..export.card import write_model_card

    others: dict[str, dict[str, float]] = {}
    for name, value in _pairs(compared_with, "--compared-with").items():
        model, separator, text = name.rpartition(":")
        if not separator:
            raise typer.BadParameter(f"{name}={value} names no model: write MODEL:TEXT=VALUE.")
        others.setdefault(model, {})[text] = _number(value)
    path = write_model_card(
        directory,
        base_model=base_model,
        repository=repository,
        license=license,
        language=language or None,
        datasets=datasets or None,
        tags=tags or None,
        settings={name: value for name, _, value in (pair.partition("=") for pair in settings or ())} or None,
        command=command,
        perplexity={text: _number(value) for text, value in _pairs(perplexity, "--perplexity").items()} or None,
        compared_with=others or None,
    )
    say(f"the card is in {path}")


def _pairs(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    pairs = {}
    for pair in given or ():
        name, separator, value = pair.rpartition("=")
        if not separator:
            raise typer.BadParameter(f"{option} {pair}: write NAME=VALUE.")
        pairs[name] = value
    return pairs


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text} is no number.") from None
