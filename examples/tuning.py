"""PEQA with the stock Trainer, as several examples need it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import windows
from peft import get_peft_model
from stages import digest
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator, set_seed

import peft_quant
from peft_quant.evaluation.loading import load_model


@dataclass
class Settings:
    """What decides the adapter; a change of any of these trains anew.

    Attributes:
        target_modules: layers whose scales are tuned; None for all.
    """

    model: str
    train_text: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int = 0
    target_modules: list[str] | None = None

    @property
    def name(self) -> str:
        return f"adapter-{digest(**asdict(self))}"


def tune(settings: Settings, directory: Path, validation_text: str | None = None) -> None:
    """Tune the scales of a GPTQ model on a text and save the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    set_seed(settings.seed)
    config = peft_quant.PEQAConfig(task_type="CAUSAL_LM", target_modules=settings.target_modules)
    model = get_peft_model(load_model(settings.model), config)
    model.print_trainable_parameters()

    def dataset(text: str, number: int) -> list[dict[str, torch.Tensor]]:
        batch = windows(tokenizer, text, settings.sequence_length, number)
        return [{"input_ids": window, "labels": window} for window in batch]

    validation: dict[str, Any] = {}
    if validation_text is not None:
        validation = {"eval_strategy": "steps", "eval_steps": max(1, settings.steps // 2)}
    arguments = TrainingArguments(
        output_dir=directory.with_name(directory.name + "-checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, settings.steps // 10),
        weight_decay=0.0,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, settings.steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,
        seed=settings.seed,
        **validation,
    )
    Trainer(
        model,
        arguments,
        train_dataset=dataset(settings.train_text, settings.steps * settings.batch_size),
        eval_dataset=None if validation_text is None else dataset(validation_text, 8),
        data_collator=default_data_collator,
    ).train()
    model.save_pretrained(directory)
