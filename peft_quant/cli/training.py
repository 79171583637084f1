"""What `train` and `correct` have in common: options, texts, a run that may be interrupted, and its card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..tables import markdown_table
from .console import is_first_process, say
from .options import TEXTS


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

Data = Annotated[str, typer.Option(help=f"Text to train on: {TEXTS}.")]
Output = Annotated[
    Path,
    typer.Option("--output", "--output-dir", help="Directory for the result, and for checkpoints until it is there."),
]
EvalData = Annotated[
    str | None, typer.Option(help="Text to measure perplexity on, in place of the last part of --data.")
]
HeldOut = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of --data, its last part, to measure perplexity on; 0 for none.")
]
EvalWindows = Annotated[int, typer.Option(min=1, help="At most so many windows to measure perplexity on.")]
SequenceLength = Annotated[int, typer.Option(min=2, help="Tokens of a window; the text is cut into these.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint in --output; give the same options again.")
]


def open_output(output: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, if there is one and it is wanted.

    Raises:
        FileExistsError: there is something in the directory, and it is not to be resumed.
        FileNotFoundError: there is nothing to resume.
    """
    from ..trainers.interrupt import last_complete_checkpoint

    if not resume:
        if output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} is not empty: choose another directory, or go on there with --resume.")
        return None
    if not output.is_dir():
        raise FileNotFoundError(f"{output} does not exist, so there is nothing to resume: leave out --resume.")
    checkpoint = last_complete_checkpoint(output)
    say(f"going on from {checkpoint}" if checkpoint else f"{output} has no checkpoint yet: starting at step 0")
    return checkpoint


def make_arguments(arguments_class: type[Any], given: dict[str, Any], output: Path, push_to_hub: str | None) -> Any:
    """Training arguments from what was given and the command's own options."""
    if "resume_from_checkpoint" in given:
        raise typer.BadParameter("resume_from_checkpoint has no effect here: use --resume.")
    if push_to_hub:
        given = {**given, "push_to_hub": True, "hub_model_id": push_to_hub}
    return arguments_class(output_dir=str(output), **given)


def read_windows(
    arguments: TrainingArguments,
    tokenizer: Any,
    data: str,
    column: str,
    split: str,
    eval_data: str | None,
    held_out: float,
    eval_windows: int,
    sequence_length: int,
) -> tuple[Dataset, Dataset | None]:
    """Windows to train on, and those to measure perplexity on, if there are to be any."""
    from ..evaluation.text import read_texts, spread, token_windows

    with arguments.main_process_first(desc="reading the text"):
        windows = token_windows(read_texts(data, column, split), tokenizer, sequence_length)
        if eval_data is not None:
            measured = token_windows(read_texts(eval_data, column, split), tokenizer, sequence_length)
            return windows, spread(measured, eval_windows)
        if not held_out:
            return windows, None
        cut = len(windows) - max(1, int(len(windows) * held_out))
        if not cut:
            raise ValueError(
                f"{data} has {len(windows)} window of {sequence_length} tokens, and none is left to train on beside "
                "the one that is held out: give more text, a shorter --sequence-length or --held-out 0."
            )
        return windows.select(range(cut)), spread(windows.select(range(cut, len(windows))), eval_windows)


def measure(model: Any, arguments: TrainingArguments, windows: Dataset | None, what: str) -> float | None:
    """Perplexity of a model in its own dtype, without autocast; None if there are no windows."""
    if windows is None:
        return None
    import torch
    from accelerate.utils import extract_model_from_parallel

    from ..evaluation.perplexity import perplexity

    return perplexity(
        extract_model_from_parallel(model, keep_fp32_wrapper=False),
        torch.tensor(windows["input_ids"][:]),
        batch_size=arguments.per_device_eval_batch_size,
        description=f"perplexity, {what}" if is_first_process() else None,
    )


def run(trainer: Trainer, checkpoint: str | None, output: Path) -> None:
    """Train, and save the result.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once there is a checkpoint.
    """
    from ..trainers.interrupt import SaveOnInterrupt

    _report(trainer)
    interrupt = SaveOnInterrupt(trainer)
    with interrupt.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.saved:
        say(f"stopped after step {trainer.state.global_step}; its checkpoint is in {output}", error=True)
        raise KeyboardInterrupt
    trainer.save_model(str(output))


def _report(trainer: Trainer) -> None:
    """Let the trainer write the report of its run."""
    from .. import ReportCallback

    try:
        trainer.add_callback(ReportCallback())
    except ImportError as error:
        say(f"no report: {error}", error=True)


def finish(
    trainer: Trainer,
    output: Path,
    command: list[str],
    options: Mapping[str, Any],
    data: str,
    eval_data: str | None,
    rows: Mapping[str, float | None],
) -> None:
    """Print the perplexities, write the card, push, if that was asked for, and leave the group of processes.

    Args:
        command: words of the command before its options.
        options: that were given, by name.
        data: what was trained on.
        eval_data: what was measured on, if it was not a part of that.
        rows: perplexity by the name of the model, the trained one last; None if it was not measured.
    """
    text = str(_without_directory(eval_data or data)) + ("" if eval_data else ", held-out part")
    measured = {name: round(value, 4) for name, value in rows.items() if value is not None}
    if is_first_process():
        from ..export.card import write_model_card

        shown = {name: _without_directory(value) for name, value in options.items()}
        words = [f"--{name} {shlex.quote(_as_text(value))}" for name, value in shown.items()]
        *others, own = rows
        write_model_card(
            output,
            datasets=data.partition(":")[0] if not Path(data).exists() else None,
            settings=shown,
            command=" ".join(["peft-quant", *command, *words]),
            perplexity={text: measured[own]} if own in measured else None,
            compared_with={name: {text: measured[name]} for name in others if name in measured},
        )
    if measured:
        say(markdown_table(["model", f"perplexity, {text}"], measured.items()))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        say(f"pushed to {trainer.hub_model_id}")
    trainer.accelerator.end_training()  # whose threads may abort a process that ends before them


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


def _without_directory(value: Any) -> Any:
    """A path by its name: where it lies is nobody's business."""
    return Path(value).name if isinstance(value, (str, Path)) and Path(value).exists() else value
