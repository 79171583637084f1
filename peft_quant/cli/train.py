"""`peft-quant train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import prepare, say
from .distillation import Distillation, Start
from .options import TEXTS, Column, Config, PushToHub, Split, parse_fields
from .training import finish, hold_out, measure, open_output, run, with_adapter


def train(
    ctx: typer.Context,
    method: Annotated[
        Literal["peqa", "lrec", "qft"],
        typer.Argument(help="peqa: scales of a GPTQ model; lrec: low-rank adapter; qft: everything, in int8."),
    ],
    model: Annotated[str, typer.Option(help="GPTQ checkpoint (qft: also float or int8): directory or Hub id.")],
    data: Annotated[str, typer.Option(help=f"Text to train on: {TEXTS}.")],
    output: Annotated[
        Path,
        typer.Option("--output", "--output-dir", help="Directory for the result and for checkpoints."),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(help="Float model to distill into an lrec adapter: directory or Hub id."),
    ] = None,
    start: Annotated[
        Start,
        typer.Option(
            help="Initialization of the adapter: minimizes the error of outputs (whitened) or weights (svd), or zero."
        ),
    ] = "whitened",
    calibration_windows: Annotated[
        int, typer.Option(min=2, help="Windows of --data on which output errors are measured.")
    ] = 128,
    cache: Annotated[
        Path | None,
        typer.Option(help="Directory to cache the teacher's log-probabilities in."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Log-probabilities per token in --cache.")] = 64,
    column: Column = "text",
    split: Split = "train",
    eval_data: Annotated[
        str | None, typer.Option(help="Text to measure perplexity on; by default, the held-out part of --data.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Fraction at the end of --data to measure perplexity on; 0 for none."),
    ] = 0.1,
    eval_windows: Annotated[int, typer.Option(min=1, help="Maximum number of windows to measure perplexity on.")] = 64,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window that the text is cut into.")] = 512,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in --output; repeat the other options.")
    ] = False,
    push_to_hub: PushToHub = None,
    config: Config = None,
) -> None:
    """Fine-tune a model on text; METHOD comes first.

    Every field of the method's config (PEQAConfig, LRECConfig, QFTConfig) and of its training arguments (transformers'
    TrainingArguments; QFTTrainingArguments for qft; DistillationTrainingArguments with --teacher) is also an option
    of the same name: --r 16 --learning_rate 3e-4 --max_steps 40. Lists and mappings of a config are written as YAML:
    --target_modules '[q_proj, v_proj]'.

    With --teacher, an LREC adapter is trained to match the next-token distribution of the float model. The errors of
    each layer before and after initialization are written to layer_errors.md and layer_errors.png.

    Ctrl-C writes a checkpoint after the current step; repeat the command with --resume to continue.
    """
    if teacher is not None and method != "lrec":
        raise typer.BadParameter(f"--teacher is for lrec, not for {method}: leave it out.")
    for name in ("start", "calibration_windows", "cache", "top_k"):
        source: Any = ctx.get_parameter_source(name)
        if teacher is None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --teacher: give one, or leave it out.")
    prepare()
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    import peft_quant

    from ..evaluation.loading import load_tokenizer
    from ..evaluation.text import read_texts, spread, token_windows

    classes: dict[str, tuple[Any, Any, Any]] = {
        "peqa": (peft_quant.PEQAConfig, TrainingArguments, Trainer),
        "lrec": (peft_quant.LRECConfig, TrainingArguments, Trainer),
        "distillation": (
            peft_quant.LRECConfig,
            peft_quant.DistillationTrainingArguments,
            peft_quant.DistillationTrainer,
        ),
        "qft": (peft_quant.QFTConfig, peft_quant.QFTTrainingArguments, peft_quant.QFTTrainer),
    }
    config_class, arguments_class, trainer_class = classes["distillation" if teacher else method]
    of_config, of_arguments = parse_fields(ctx, config_class, arguments_class)
    if "resume_from_checkpoint" in of_arguments:
        raise typer.BadParameter("resume_from_checkpoint has no effect here: use --resume.")
    hub = {"push_to_hub": True, "hub_model_id": push_to_hub} if push_to_hub else {}
    arguments = arguments_class(output_dir=str(output), **{**of_arguments, **hub})
    checkpoint = open_output(output, resume)
    tokenizer = load_tokenizer(model)
    with arguments.main_process_first(desc="reading the text"):
        windows, measured = token_windows(read_texts(data, column, split), tokenizer, sequence_length), None
        if eval_data is not None:
            measured = token_windows(read_texts(eval_data, column, split), tokenizer, sequence_length)
        elif held_out:
            windows, measured = hold_out(windows, held_out)
        measured = measured and spread(measured, eval_windows)
    evaluated = None if arguments.eval_strategy == "no" else measured

    set_seed(arguments.seed)
    rows: dict[str, float | None] = {}
    options: dict[str, Any] = {"model": model}
    further: dict[str, Any] = {}
    if method == "qft":
        prepared = _in_int8(model, config_class(**of_config), arguments)
    elif teacher is None:
        prepared = with_adapter(model, config_class(task_type="CAUSAL_LM", **of_config), arguments)
    else:
        options |= {"teacher": teacher, "start": start}
        distillation = Distillation(teacher, start, calibration_windows, cache, top_k, arguments)
        prepared = distillation.student(model, config_class(task_type="CAUSAL_LM", **of_config), windows, output)
        further, rows["float"] = distillation.teach(windows, evaluated, measured)
    trainer = trainer_class(
        prepared,
        arguments,
        train_dataset=windows,
        eval_dataset=evaluated,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        **further,
    )
    if teacher is None:
        rows["before"] = measure(trainer.model, arguments, measured, "before")
    else:
        with prepared.disable_adapter():
            rows["GPTQ"] = measure(trainer.model, arguments, measured, "GPTQ")
        if start != "zero":
            rows[f"start: {start}"] = measure(trainer.model, arguments, measured, "start")
    run(trainer, checkpoint, output)
    rows[method.upper()] = measure(trainer.model, arguments, measured, "after")
    options |= {"data": data, "sequence_length": sequence_length, **of_config, **of_arguments}
    finish(trainer, f"train {method}", options, eval_data, rows)
    say(f"the {'model in int8' if method == 'qft' else 'adapter'} is in {output}")


def _in_int8(model: str, config: Any, arguments: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from .. import convert_to_int8
    from ..evaluation.loading import load_model, quantization_of

    method = quantization_of(model)
    if method == "gptq":
        return convert_to_int8(load_model(model, device=arguments.device), config)
    if method == "qft":
        return load_model(model, device=arguments.device)
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map=arguments.device, quantization_config=config
    )
