"""A Trainer callback that writes a report of the training run."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import IntervalStrategy

from ...estimate.report import MemoryReport, MemoryRow
from ...export.card import package_versions
from ...first_step import sample
from ...qft.weight import Int8Weight
from ..qft import QFTTrainingArguments, memory_of_step
from . import facts
from .page import Evaluation, Sample, TrainingReport, format_seconds, write_training_report


REPORT = "training_report.html"

# each process holds only a part of the model and cannot run it alone
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class ReportCallback(TrainerCallback, ExportableState):
    """Writes a training report, a self-contained HTML file, at every save and at the end.

    The report has the settings, curves of the logged values, memory by kind of tensor and its measured peak, how far
    each layer moved, and perplexity and answers to prompts before and after training. Works with
    [`~transformers.Trainer`] and its subclasses, and does not affect training.

    "Before" is an evaluation before the first step, which the callback requests if the run evaluates at all
    (`eval_strategy`), or a `trainer.evaluate()` before training. A resumed run takes it from its checkpoint.

    Names and commands are written without directories and without values of options that look like secrets. If a
    report cannot be written, a warning is issued.

    Args:
        path: file of the report; `training_report.html` in `output_dir` by default.
        prompts: prompts, passed to the tokenizer unchanged. Answers are decoded greedily.
        tokenizer: tokenizer for the prompts; the trainer's `processing_class` by default.
        max_new_tokens: maximum number of tokens of an answer.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError (from `train`): there are prompts but no tokenizer.

    Example:
        ```py
        >>> from peft_quant import ReportCallback

        >>> callback = ReportCallback(prompts=["The LORD is"], tokenizer=tokenizer)
        >>> Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
        ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        prompts: Sequence[str] = (),
        tokenizer: Any = None,
        max_new_tokens: int = 48,
    ) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError("The training report needs matplotlib: `pip install matplotlib`.") from error
        self.path = None if path is None else Path(path)
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.seconds = 0.0  # training time of earlier sessions of the run
        self.before: dict[str, Any] = {"losses": {}, "answers": {}}
        self._after: dict[str, Any] = {"losses": {}, "answers": {}}
        self._started: float | None = None  # start time, set during training
        self._logged: int | None = None  # number of log entries at the end of training
        self._sizes: dict[str, int | None] = {}  # number of evaluated samples
        self._first_evaluation = ExitStack()  # cleanup after an evaluation requested here
        self._codes: dict[str, torch.Tensor] = {}
        self._memory: dict[str, MemoryRow] = {}
        self._memory_of_step: MemoryReport | None = None

    def state(self) -> dict[str, Any]:
        path = None if self.path is None else os.fspath(self.path)
        return {
            "args": {"path": path, "prompts": self.prompts, "max_new_tokens": self.max_new_tokens},
            "attributes": {"before": self.before, "seconds": self._trained_for()},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, tokenizer = kwargs["model"], self.tokenizer or kwargs.get("processing_class")
        saved = state.stateful_callbacks
        if self.prompts and tokenizer is None:
            message = (
                f"There are {len(self.prompts)} prompts and no tokenizer: pass `tokenizer` to ReportCallback, or "
                "`processing_class` to the trainer, which `restore_callback_states_from_checkpoint` needs."
            )
            if not state.global_step:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        outside, self._after = self._after["losses"], {"losses": {}, "answers": {}}
        self.before, self.seconds, self._started = {"losses": outside, "answers": {}}, 0.0, time.perf_counter()
        self._logged, self._codes, self._memory, self._memory_of_step = None, {}, {}, None
        if state.global_step:
            own = saved.get(type(self).__name__)
            if isinstance(own, dict):
                self.before, self.seconds = own["attributes"]["before"], own["attributes"]["seconds"]
        else:
            int8 = [(name, p) for name, p in model.named_parameters() if isinstance(p, Int8Weight) and p.requires_grad]
            self._codes = {name: sample(p.codes) for name, p in int8}
            if state.is_world_process_zero:
                self.before["answers"] = self._answers(model, tokenizer)
            if args.eval_strategy != IntervalStrategy.NO and not args.eval_on_start:
                args.eval_on_start = True
                self._first_evaluation.callback(setattr, args, "eval_on_start", False)
                self._first_evaluation.enter_context(_random_numbers_come_back())
        # checkpoints written without this callback have no entry for it
        saved.setdefault(type(self).__name__, self.state())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_evaluation.close()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "gradients" not in self._memory:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self._memory["gradients"] = facts.memory_row("gradients", gradients)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "optimizer state" not in self._memory:
            leaves = tree_leaves(getattr(kwargs["optimizer"], "state", {}))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if tensors:
                self._memory["optimizer state"] = facts.memory_row("optimizer state", tensors)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset: Any = getattr(kwargs.get("eval_dataloader"), "dataset", None)
        size = len(dataset) if hasattr(dataset, "__len__") else None
        for name, loss in facts.losses(kwargs["metrics"]).items():
            known = self._sizes.setdefault(name, size)
            if self._started is not None:
                self._sizes[name] = size
                if size != known:  # another set was evaluated before training
                    self.before["losses"].pop(name, None)
            elif size == known:
                self._after["losses"][name] = loss
        if self._started is None and state.global_step:
            self._write(args, state, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds, self._started, self._logged = self._trained_for(), None, len(state.log_history)
        if state.is_world_process_zero:
            tokenizer = self.tokenizer or kwargs.get("processing_class")
            self._after["answers"] = self._answers(kwargs["model"], tokenizer)
        self._write(args, state, **kwargs)

    def _trained_for(self) -> float:
        return self.seconds + (0 if self._started is None else time.perf_counter() - self._started)

    def _answers(self, model: Any, tokenizer: Any) -> dict[str, str]:
        """The model's answers by prompt; empty if it cannot be run."""
        answers: dict[str, str] = {}
        if tokenizer is None or AcceleratorState().distributed_type in _SHARDED:
            return answers
        with _warn_of_errors("Samples"), _evaluating(model):
            for prompt in self.prompts:
                inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
                greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
                pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
                tokens = model.generate(**inputs, max_new_tokens=self.max_new_tokens, pad_token_id=pad, **greedy)[0]
                start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
                answers[prompt] = tokenizer.decode(tokens[start:], skip_special_tokens=True)
        return answers

    def _write(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with _warn_of_errors("The file"):
                path = self.path or Path(args.output_dir or "", REPORT)
                write_training_report(self._report(args, state, **kwargs), path)

    def _report(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> TrainingReport:
        method, name = facts.method(model), facts.model_name(model)
        log = state.log_history[: self._logged]  # later evaluations may be on other data
        return TrainingReport(
            title=f"{method} on {name}" if name else method,
            status=facts.status(state, self._started is not None),
            summary=facts.summary(args, state, model) | {"Time": format_seconds(self._trained_for())},
            command=facts.command(),
            log=log,
            memory=self._memory_rows(args, model, kwargs.get("train_dataloader")),
            peak=facts.peak(),
            changes=facts.int8_changes(model, self._codes) if self._codes else facts.adapter_changes(model),
            evaluations=self._evaluations(args, state, model, log),
            samples=[
                Sample(prompt, self.before["answers"].get(prompt), self._after["answers"].get(prompt))
                for prompt in self.prompts
                if prompt in self.before["answers"] or prompt in self._after["answers"]
            ],
            seconds=self._trained_for(),
            versions=package_versions(),
        )

    def _memory_rows(self, args: Any, model: nn.Module, train_dataloader: Any) -> list[MemoryRow]:
        if isinstance(args, QFTTrainingArguments):
            if self._memory_of_step is None:
                self._memory_of_step = memory_of_step(model, args, getattr(train_dataloader, "dataset", None))
            return list(self._memory_of_step.rows)
        return [row for row in (*facts.model_rows(model), *self._memory.values()) if row.bytes]

    def _evaluations(
        self, args: TrainingArguments, state: TrainerState, model: Any, log: Sequence[Mapping[str, Any]]
    ) -> list[Evaluation]:
        best = state.best_global_step if args.load_best_model_at_end and self._started is None else None
        before, after = dict(self.before["losses"]), dict[str, float]()
        for entry in log:
            if entry["step"] == 0:
                before |= facts.losses(entry)
            elif entry["step"] == (best or entry["step"]):
                after |= facts.losses(entry)
        after |= self._after["losses"]
        rewards = any("rewards/" in key for entry in log for key in entry)
        speaks = bool(getattr(model, "can_generate", bool)())
        has_perplexity = speaks and not args.label_smoothing_factor and not rewards
        return [
            Evaluation(name.removeprefix("eval").strip("_"), before.get(name), after.get(name), has_perplexity)
            for name in dict.fromkeys([*before, *after])
        ]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; restores module modes and random states at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _random_numbers_come_back():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _random_numbers_come_back() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _warn_of_errors(what: str) -> Iterator[None]:
    """Turn errors of the report into warnings, so that training continues."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"{what} of the training report: {type(error).__name__}: {error}. Training goes on.", stacklevel=2
        )
