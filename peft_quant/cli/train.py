"""`peft-quant train`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from .console import prepare, say
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


class Method(str, Enum):
    """What is trained."""

    peqa = "peqa"
    lrec = "lrec"
    qft = "qft"


def train(
    ctx: typer.Context,
    method: Annotated[
        Method, typer.Argument(help="peqa: scales of a GPTQ model; lrec: a low-rank branch; qft: everything, in int8.")
    ],
    model: Annotated[str, typer.Option(help="GPTQ checkpoint, for qft also a float one: directory or Hub id.")],
    data: Data,
    output: Output,
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
    """Fine-tune a model on text; METHOD comes first.

    Every field of the method's config (PEQAConfig, LRECConfig, QFTConfig) and of its training arguments (transformers'
    TrainingArguments, for qft QFTArguments) is an option too, under its own name: --r 16 --learning_rate 3e-4
    --max_steps 40. Lists and mappings of a config are written as YAML: --target_modules '[q_proj, v_proj]'.

    Ctrl-C writes a checkpoint after the current step; the same command with --resume goes on from there.
    """
    prepare()
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    from .. import LRECConfig, PEQAConfig, QFTArguments, QFTConfig, QFTTrainer
    from ..evaluation.loading import load_tokenizer

    config_class, arguments_class, trainer_class = {
        Method.peqa: (PEQAConfig, TrainingArguments, Trainer),
        Method.lrec: (LRECConfig, TrainingArguments, Trainer),
        Method.qft: (QFTConfig, QFTArguments, QFTTrainer),
    }[method]
    of_config, of_arguments = parse_fields(ctx, config_class, arguments_class)
    arguments = make_arguments(arguments_class, of_arguments, output, push_to_hub)
    checkpoint = open_output(output, resume)
    tokenizer = load_tokenizer(model)
    windows, measured = read_windows(
        arguments, tokenizer, data, column, split, eval_data, held_out, eval_windows, sequence_length
    )
    set_seed(arguments.seed)
    if method is Method.qft:
        prepared = _in_int8(model, QFTConfig(**of_config), arguments)
    else:
        prepared = _with_adapter(model, config_class(task_type="CAUSAL_LM", **of_config), arguments)
    trainer = trainer_class(
        prepared,
        arguments,
        train_dataset=windows,
        eval_dataset=measured,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    rows = {"before": measure(trainer.model, arguments, measured, "before")}
    run(trainer, checkpoint, output)
    rows[method.value.upper()] = measure(trainer.model, arguments, measured, "after")
    options = {"model": model, "data": data, "sequence_length": sequence_length, **of_config, **of_arguments}
    finish(trainer, output, ["train", method.value], options, data, eval_data, rows)
    say(f"the {'model in int8' if method is Method.qft else 'adapter'} is in {output}")


def _with_adapter(model: str, config: Any, arguments: Any) -> Any:
    from peft import get_peft_model

    from ..evaluation.loading import load_model, quantization_of

    method = quantization_of(model)
    if method != "gptq":
        raise ValueError(
            f"{model} is not a GPTQ checkpoint (quant_method: {method}): make one with `peft-quant quantize`, or "
            "train the float model with `peft-quant train qft`."
        )
    return get_peft_model(load_model(model, device=arguments.device), config)


def _in_int8(model: str, config: Any, arguments: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from .. import quantize_model
    from ..evaluation.loading import load_model, quantization_of

    method = quantization_of(model)
    if method == "gptq":
        return quantize_model(load_model(model, device=arguments.device), config)
    if method == "qft":
        return load_model(model, device=arguments.device)
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map=arguments.device, quantization_config=config
    )
