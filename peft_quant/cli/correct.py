"""`peft-quant correct`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import is_first_process, prepare, say
from .fields import parse_fields
from .options import Column, Config, PushToHub, Split
from .training import (
    Data,
    EvalData,
    EvalWindows,
    HeldOut,
    Output,
    Resume,
    SequenceLength,
    finish,
    make_arguments,
    measure,
    open_output,
    read_windows,
    run,
)


class Start(str, Enum):
    """What the branch starts as."""

    zero = "zero"
    svd = "svd"
    whitened = "whitened"


def correct(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="GPTQ checkpoint: directory or Hub id.")],
    teacher: Annotated[str, typer.Option(help="The float model that was quantized: directory or Hub id.")],
    data: Data,
    output: Output,
    start: Annotated[
        Start, typer.Option(help="Of the branch: the best repair of outputs, of weights, or nothing.")
    ] = Start.whitened,
    calibration_windows: Annotated[
        int, typer.Option(min=2, help="Windows of --data that outputs are repaired on.")
    ] = 128,
    cache: Annotated[
        Path | None,
        typer.Option(help="Directory for what the teacher says: it is asked once, and goes on where it stopped."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Log-probabilities that the cache keeps of each token.")] = 64,
    column: Column = "text",
    split: Split = "train",
    eval_data: EvalData = None,
    held_out: HeldOut = 0.1,
    eval_windows: EvalWindows = 64,
    sequence_length: SequenceLength = 512,
    resume: Resume = False,
    push_to_hub: PushToHub = None,
    config: Config = None,
) -> None:
    """Train an LREC branch to say what the float model does.

    Every field of LRECConfig and of LRECTrainingArguments (transformers' TrainingArguments, kl_weight, ce_weight,
    hidden_weight, temperature) is an option too, under its own name: --r 32 --ce_weight 0.5 --max_steps 1000.

    Writes the adapter and, of a start that is not zero, the errors of every layer before and after it
    (layer_errors.md, layer_errors.png). Ctrl-C writes a checkpoint after the current step; the same command with
    --resume goes on from there.
    """
    prepare()
    from accelerate.utils import release_memory
    from datasets import concatenate_datasets
    from peft import PeftModel
    from transformers import default_data_collator, set_seed

    from .. import LRECConfig, LRECTrainer, LRECTrainingArguments
    from ..evaluation.loading import load_model, load_tokenizer

    of_config, of_arguments = parse_fields(ctx, LRECConfig, LRECTrainingArguments)
    arguments = make_arguments(LRECTrainingArguments, of_arguments, output, push_to_hub)
    checkpoint = open_output(output, resume)
    tokenizer, teacher_tokenizer = load_tokenizer(model), load_tokenizer(teacher)
    windows, measured = read_windows(
        arguments, tokenizer, data, column, split, eval_data, held_out, eval_windows, sequence_length
    )
    evaluated = None if arguments.eval_strategy == "no" else measured

    set_seed(arguments.seed)
    started = output / "start"
    with arguments.main_process_first(desc="the start"):
        if not started.exists():
            lrec = LRECConfig(task_type="CAUSAL_LM", **of_config)
            lrec.refuse_other_lora_options()
            _start(
                load_model(model, device=arguments.device), lrec, start, teacher, windows, calibration_windows, started
            )
    student = PeftModel.from_pretrained(load_model(model, device=arguments.device), started, is_trainable=True)

    rows: dict[str, float | None] = {}
    taught: Any = None  # the teacher, or the directory of what it says
    if cache is not None and _is_complete(cache):
        taught = cache
    elif arguments.kl_weight or arguments.hidden_weight:
        taught = load_model(teacher, device=arguments.device)
        rows["float"] = measure(taught, arguments, measured, "float")
        if cache is not None:
            samples = windows if evaluated is None else concatenate_datasets([windows, evaluated])
            with arguments.main_process_first(desc="the teacher's cache"):
                if is_first_process():
                    _fill(cache, taught, samples, arguments, top_k, teacher_tokenizer)
            (taught,) = release_memory(taught)
            taught = cache
    trainer = LRECTrainer(
        student,
        arguments,
        teacher=taught,
        teacher_processing_class=teacher_tokenizer,
        processing_class=tokenizer,
        train_dataset=windows,
        eval_dataset=evaluated,
        data_collator=default_data_collator,
    )
    with student.disable_adapter():
        rows["GPTQ"] = measure(student, arguments, measured, "GPTQ")
    if start is not Start.zero:
        rows[f"start: {start.value}"] = measure(student, arguments, measured, "start")
    run(trainer, checkpoint, output)
    rows["corrected"] = measure(student, arguments, measured, "corrected")
    options: dict[str, Any] = {"model": model, "teacher": teacher, "data": data, "start": start.value}
    options |= {"sequence_length": sequence_length, **of_config, **of_arguments}
    finish(trainer, output, ["correct"], options, data, eval_data, rows)
    say(f"the adapter is in {output}")


def _start(model: Any, lrec: Any, start: Start, teacher: str, windows: Any, calibration: int, out: Path) -> None:
    """Save the branch as it starts and, beside it, what that repairs of every layer."""
    import torch
    from peft import get_peft_model

    from .. import initialize_lrec_weights, plot_layer_errors
    from ..evaluation.text import spread
    from ..files import new_directory

    student = get_peft_model(model, lrec)
    with new_directory(out) as directory:
        if start is not Start.zero:
            batches = torch.tensor(spread(windows, calibration)["input_ids"][:]).split(4)
            report = initialize_lrec_weights(student, teacher, start.value, batches)
            out.with_name("layer_errors.md").write_text(f"{report}\n", encoding="utf-8")
            try:
                plot_layer_errors(report, out.with_name("layer_errors.png"))
            except ImportError as error:
                say(str(error), error=True)
        student.save_pretrained(directory)


def _is_complete(cache: Path) -> bool:
    from ..trainers.distillation.cache import CachedTeacher

    try:
        CachedTeacher(cache)
    except ValueError:
        return False
    return True


def _fill(cache: Path, teacher: Any, samples: Any, arguments: Any, top_k: int, tokenizer: Any) -> None:
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from .. import cache_teacher

    batches: Any = DataLoader(samples, arguments.per_device_train_batch_size, collate_fn=default_data_collator)
    cache_teacher(teacher, batches, cache, k=top_k, temperature=arguments.temperature, tokenizer=tokenizer)
