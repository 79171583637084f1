"""Steps of `train`: preparing the output and the text, an interruptible run, and the model card."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tables import markdown_table
from .console import is_first_process, say


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments


def open_output(output: Path, resume: bool) -> str | None:
    """The checkpoint to resume from; None if there is none or `resume` is False.

    Raises:
        FileExistsError: the directory is not empty and `resume` is False.
        FileNotFoundError: `resume` is True and the directory does not exist.
    """
    from ..trainers.interrupt import last_complete_checkpoint

    if not resume:
        if output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} is not empty: choose another directory, or resume it with --resume.")
        return None
    if not output.is_dir():
        raise FileNotFoundError(f"{output} does not exist, so there is nothing to resume: leave out --resume.")
    checkpoint = last_complete_checkpoint(output)
    say(f"resuming from {checkpoint}" if checkpoint else f"{output} has no checkpoint yet: starting at step 0")
    return checkpoint


def hold_out(windows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Split off the last windows, at least one, to measure perplexity on.

    Raises:
        ValueError: no window is left to train on.
    """
    kept = len(windows) - max(1, int(len(windows) * share))
    if not kept:
        raise ValueError(
            f"--data has {len(windows)} window of {len(windows[0]['input_ids'])} tokens, and none is left to train on "
            "beside the one that is held out: give more text, a shorter --sequence-length or --held-out 0."
        )
    return windows.select(range(kept)), windows.select(range(kept, len(windows)))


def with_adapter(model: str, config: Any, arguments: TrainingArguments) -> Any:
    """Load a GPTQ checkpoint and add a new adapter.

    Raises:
        ValueError: the model is not a GPTQ checkpoint.
    """
    from peft import get_peft_model

    from ..evaluation.loading import load_model, quantization_of

    method = quantization_of(model)
    if method != "gptq":
        raise ValueError(
            f"{model} is not a GPTQ checkpoint (quant_method: {method}): make one with `peft-quant quantize`, or "
            "train the float model with `peft-quant train qft`."
        )
    return get_peft_model(load_model(model, device=arguments.device), config)


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
    """Train, write the report, and save the result.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    from .. import ReportCallback
    from ..trainers.interrupt import SaveOnInterrupt

    try:
        trainer.add_callback(ReportCallback())
    except ImportError as error:
        say(f"no report: {error}", error=True)
    interrupt = SaveOnInterrupt(trainer)
    with interrupt.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.saved:
        say(f"stopped after step {trainer.state.global_step}; its checkpoint is in {output}", error=True)
        raise KeyboardInterrupt
    trainer.save_model(str(output))


def finish(
    trainer: Trainer, command: str, options: dict[str, Any], eval_data: str | None, rows: dict[str, float | None]
) -> None:
    """Print perplexities, write the model card, push to the Hub if requested, and leave the process group.

    Args:
        trainer: after training.
        command: name of the command, for the card.
        options: the command's options by name, for the card.
        eval_data: the text perplexity was measured on; None for the held-out part of the training text.
        rows: perplexity by model name, the trained model last; None if it was not measured.
    """
    shown = {name: _without_directory(value) for name, value in options.items()}
    text = _without_directory(eval_data) if eval_data else f"{shown['data']}, held-out part"
    measured = {name: round(value, 4) for name, value in rows.items() if value is not None}
    if is_first_process():
        from ..export.card import write_model_card

        words = [f"--{name} {shlex.quote(_as_text(value))}" for name, value in shown.items()]
        *others, own = rows
        data = options["data"]
        write_model_card(
            str(trainer.args.output_dir),
            datasets=data.partition(":")[0] if not Path(data).exists() else None,
            settings=shown,
            command=" ".join(["peft-quant", command, *words]),
            perplexity={text: measured[own]} if own in measured else None,
            compared_with={name: {text: measured[name]} for name in others if name in measured},
        )
    if measured:
        say(markdown_table(["model", f"perplexity, {text}"], measured.items()))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        say(f"pushed to {trainer.hub_model_id}")
    trainer.accelerator.end_training()  # its threads may abort a process that exits before them


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


def _without_directory(value: Any) -> Any:
    """Only the file name: local paths stay private."""
    return Path(value).name if isinstance(value, (str, Path)) and Path(value).exists() else value
