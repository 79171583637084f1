"""A callback of transformers' Trainer that writes the report of a training run."""

from __future__ import annotations

import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from ... import gptq
from ...estimate.report import MemoryRow
from ...export.card import package_versions, public_name
from ...first_step import sample
from ...inspection import layer_changes
from ...qft.weight import Int8Weight
from ...tuners.packed import AdaptedLinear
from ..memory import planned_memory
from .page import Changes, Evaluation, Sample, TrainingReport, format_bytes, format_seconds, write_training_report


REPORT = "training_report.html"

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SECRET = re.compile(r"(?i)token|secret|password|api.?key")
_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


class ReportCallback(TrainerCallback, ExportableState):
    """Writes a report of training, one HTML file that needs nothing else, at every save and at the end.

    It has what was trained and how, the curves of what was logged, the memory by part and its measured peak, how far
    each layer moved, the perplexity before and after, and what the model said to some prompts before and after. Works
    with [`~transformers.Trainer`] and trainers derived from it, and changes nothing of the training.

    "Before" is an evaluation before the first step, which this asks for if the run evaluates at all
    (`eval_strategy`), or that of a `trainer.evaluate()` before training. A resumed run goes on with its checkpoint's.

    Directories are left out of names and commands, and the values of options that look like secrets. A report that
    cannot be written is a warning.

    Args:
        path: of the report; `training_report.html` in `output_dir` by default.
        prompts: what to ask the model, as it is given to the tokenizer. Answers are greedy.
        tokenizer: for the prompts, if the trainer has no `processing_class`.
        max_new_tokens: of an answer.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError (from `train`): there are prompts and no tokenizer.

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
        self.seconds = 0.0  # of earlier sessions of the run
        self.before: dict[str, Any] = {"losses": {}, "answers": {}}
        self._after: dict[str, Any] = {"losses": {}, "answers": {}}
        self._started: float | None = None  # while it trains
        self._logged: int | None = None  # entries of the log until training ended
        self._sizes: dict[str, int | None] = {}  # samples that were evaluated
        self._random: Any = None  # what an evaluation that only this asked for is to give back
        self._codes: dict[str, torch.Tensor] = {}
        self._memory: dict[str, MemoryRow] = {}

    def state(self) -> dict[str, Any]:
        path = None if self.path is None else os.fspath(self.path)
        return {
            "args": {"path": path, "prompts": self.prompts, "max_new_tokens": self.max_new_tokens},
            "attributes": {"before": self.before, "seconds": self._trained_for()},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, tokenizer = kwargs["model"], self.tokenizer or kwargs.get("processing_class")
        saved: Any = state.stateful_callbacks
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
        self._logged, self._codes, self._memory = None, {}, {}
        if state.global_step:
            own = saved.get(type(self).__name__)
            if isinstance(own, dict):
                self.before, self.seconds = own["attributes"]["before"], own["attributes"]["seconds"]
        else:
            self._codes = _sample_codes(model)
            if state.is_world_process_zero:
                self.before["answers"] = self._answers(model, tokenizer)
            if args.eval_strategy != IntervalStrategy.NO and not args.eval_on_start:
                args.eval_on_start, self._random = True, _random_state()
        # a checkpoint that was written without this callback has no place for it
        saved.setdefault(type(self).__name__, self.state())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._random is not None:
            args.eval_on_start = False
            _set_random_state(self._random)
            self._random = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "gradients" not in self._memory:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self._memory["gradients"] = _row("gradients", gradients)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._memory.get("optimizer state", _row("", [])).bytes:
            state_of_optimizer = tree_leaves(getattr(kwargs["optimizer"], "state", {}))
            tensors = [leaf for leaf in state_of_optimizer if isinstance(leaf, torch.Tensor)]
            self._memory["optimizer state"] = _row("optimizer state", tensors)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset: Any = getattr(kwargs.get("eval_dataloader"), "dataset", None)
        size = len(dataset) if hasattr(dataset, "__len__") else None
        for name, loss in _losses(kwargs["metrics"]).items():
            known = self._sizes.setdefault(name, size)
            if self._started is not None:
                self._sizes[name] = size
                if size != known:  # what was evaluated before training was something else
                    self.before["losses"].pop(name, None)
            elif size == known:
                self._after["losses"][name] = loss
        if self._started is None and state.global_step:
            self._write(args, state, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds, self._started, self._logged = self._trained_for(), None, len(state.log_history)
        if state.is_world_process_zero:
            tokenizer = self.tokenizer or kwargs.get("processing_class")
            self._after["answers"] = self._answers(kwargs["model"], tokenizer)
        self._write(args, state, **kwargs)

    def _trained_for(self) -> float:
        return self.seconds + (0 if self._started is None else time.perf_counter() - self._started)

    def _answers(self, model: Any, tokenizer: Any) -> dict[str, str]:
        """What the model says to the prompts."""
        answers: dict[str, str] = {}
        if tokenizer is None or _is_sharded():
            return answers
        with _warn_of_errors("Samples"), _undisturbed(model):
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
        method, name = _method(model), _model_name(model)
        log = state.log_history[: self._logged]  # what is evaluated later may be something else
        return TrainingReport(
            title=f"{method} on {name}" if name else method,
            status=_status(state, self._started is not None),
            summary=_summary(args, state, model) | {"Time": format_seconds(self._trained_for())},
            command=_command(),
            log=log,
            memory=self._memory_rows(args, model, kwargs.get("train_dataloader")),
            peak=_peak(),
            changes=self._changes(model),
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
        if hasattr(args, "fused") and any(isinstance(p, Int8Weight) for p in model.parameters()):
            return list(planned_memory(model, args, getattr(train_dataloader, "dataset", None)).rows)
        rows = [*_model_rows(model), *(self._memory[name] for name in self._memory)]
        return [row for row in rows if row.bytes]

    def _changes(self, model: Any) -> Changes | None:
        if self._codes:
            now = {name: sample(p.codes) for name, p in model.named_parameters() if name in self._codes}
            shares = {
                name.removesuffix(".weight"): float((codes != self._codes[name]).float().mean())
                for name, codes in now.items()
            }
            return Changes("Share of the int8 codes that changed, of some thousand of each weight", shares)
        config = _adapter_config(model)
        if config is None or not any(isinstance(module, AdaptedLinear) for module in model.modules()):
            return None
        inner = model.base_model.model if isinstance(model, PeftModel) else model

        def base(name: str) -> Any:
            layer = inner.get_submodule(name)
            return layer.base_tensors(), layer.packed

        tensors = get_peft_model_state_dict(model, adapter_name=_active_adapter(model))
        rows = layer_changes(tensors, config, base)
        shares = {row.name: row.relative for row in rows if row.relative is not None}
        return Changes(
            "Change of the scales: root mean square of delta / scale"
            if config.peft_type == "PEQA"
            else "Size of the branch: norm of its product / norm of the weight",
            {name: shares[name] for name, _ in inner.named_modules() if name in shares},
        )

    def _evaluations(
        self, args: TrainingArguments, state: TrainerState, model: Any, log: Sequence[Mapping[str, Any]]
    ) -> list[Evaluation]:
        last = log
        if args.load_best_model_at_end and self._started is None and state.best_global_step:
            last = [entry for entry in last if entry["step"] == state.best_global_step]
        before, after = dict(self.before["losses"]), dict[str, float]()
        for entry in log:
            if entry["step"] == 0:
                before |= _losses(entry)
        for entry in last:
            if entry["step"] > 0:
                after |= _losses(entry)
        after |= self._after["losses"]
        has_perplexity = _says_words(model) and not args.label_smoothing_factor
        rewards = any("rewards/" in key for entry in log for key in entry)
        return [
            Evaluation(
                name.removeprefix("eval").strip("_"), before.get(name), after.get(name), has_perplexity and not rewards
            )
            for name in dict.fromkeys([*before, *after])
        ]


def _losses(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The loss of every evaluation set by the prefix of its metrics; of LRECTrainer's the cross entropy."""
    losses = {}
    for key in metrics:
        prefix = key.removesuffix("_runtime")
        loss = metrics.get(f"{prefix}_ce", metrics.get(f"{prefix}_loss"))
        if key.endswith("_runtime") and prefix != "train" and loss is not None:
            losses[prefix] = float(loss)
    return losses


def _status(state: TrainerState, training: bool) -> str:
    if state.global_step >= state.max_steps:
        return f"finished, {state.global_step:,} steps"
    return f"{'in training' if training else 'stopped'}, step {state.global_step:,} of {state.max_steps:,}"


def _active_adapter(model: Any) -> str:
    names = model.active_adapters  # a method of transformers' models
    return (names() if callable(names) else names)[0]


def _adapter_config(model: Any) -> Any:
    return model.peft_config[_active_adapter(model)] if getattr(model, "peft_config", None) else None


def _method(model: Any) -> str:
    config = _adapter_config(model)
    if config is not None:
        return getattr(config.peft_type, "value", config.peft_type)
    return "QFT" if any(isinstance(p, Int8Weight) for p in model.parameters()) else "Full fine-tuning"


def _model_name(model: Any) -> str | None:
    return public_name(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _summary(args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    values = sum(p.numel() for p in trained)
    size = sum(_size(p) for p in trained)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts = {
        "Method": _method(model),
        "Model": _model_name(model),
        "Base format": _base_format(model),
        "Trained": f"{values:,} values, {' and '.join(_precisions(trained))}, {format_bytes(size)}",
        "Steps": f"{state.global_step:,} of {state.max_steps:,}, epoch {state.epoch or 0:.3g}",
        "Sequences a step": batch,
        "Tokens": f"{_tokens(state):,}" if _tokens(state) else None,
        "Learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "Seed": str(args.seed),
        "Skipped steps": _last(state, "skipped_steps"),
        "Device": torch.cuda.get_device_name() if torch.cuda.is_available() and args.device.type == "cuda" else "CPU",
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def _last(state: TrainerState, key: str) -> Any:
    return next((entry[key] for entry in reversed(state.log_history) if key in entry), None)


def _tokens(state: TrainerState) -> int:
    return int(state.num_input_tokens_seen or _last(state, "num_tokens") or 0)  # TRL counts for itself


def _base_format(model: Any) -> str | None:
    """How the base holds its weights, as far as its configuration says."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    known = getattr(_adapter_config(model), "base_quantization", None)
    known = known or (config if isinstance(config, dict) else config.to_dict() if config is not None else {})
    if not known.get("bits"):
        dtype: Any = getattr(model, "dtype", None)
        return str(known["quant_method"]) if "quant_method" in known else _DTYPES.get(dtype)
    words = [f"GPTQ, {known['bits']} bits"]
    if known.get("group_size"):
        words.append("one group a column" if known["group_size"] == -1 else f"groups of {known['group_size']}")
    words.append("symmetric" if known.get("sym") else "asymmetric")
    words += ["act-order"] * bool(known.get("desc_act"))
    return ", ".join(words)


def _model_rows(model: nn.Module) -> list[MemoryRow]:
    """The model's tensors, each counted once: packed weights, trained parameters and the rest."""
    rows, seen = [], set()
    packed = [module for module in model.modules() if gptq.is_packed(module)]
    if packed:
        values = bytes_held = 0
        bits = Counter[int]()
        for layer in packed:
            tensors = gptq.packed_tensors(layer)
            seen |= {id(tensor) for tensor in tensors}
            values += tensors.g_idx.numel() * tensors.qweight.shape[1]
            bits[32 * tensors.qweight.shape[0] // tensors.g_idx.numel()] += 1
            bytes_held += sum(map(_size, tensors))
        precision = f"{' and '.join(str(number) for number in sorted(bits))} bits, fp16 scales"
        rows.append(MemoryRow("packed weights", precision, values, bytes_held, True))
    parameters = [p for p in model.parameters() if id(p) not in seen]
    buffers = [b for b in model.buffers() if id(b) not in seen]
    return [
        *rows,
        _row("frozen weights", [p for p in parameters if not p.requires_grad]),
        _row("trained weights", [p for p in parameters if p.requires_grad]),
        _row("buffers", buffers),
    ]


def _row(what: str, tensors: Sequence[torch.Tensor]) -> MemoryRow:
    precision = " and ".join(_precisions(tensors))
    return MemoryRow(what, precision, sum(t.numel() for t in tensors), sum(map(_size, tensors)), True)


def _precisions(tensors: Sequence[torch.Tensor]) -> list[str]:
    names = [
        "int8" if isinstance(t, Int8Weight) else _DTYPES.get(t.dtype, str(t.dtype).removeprefix("torch."))
        for t in tensors
    ]
    return list(dict.fromkeys(names))


def _size(tensor: torch.Tensor) -> int:
    return tensor.bytes_held if isinstance(tensor, Int8Weight) else tensor.numel() * tensor.element_size()


def _peak() -> tuple[str, int] | None:
    """What was held at once so far: on GPUs by PyTorch, else by the whole process."""
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        return "CUDA memory allocated", sum(torch.cuda.max_memory_allocated(device) for device in devices)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return "the whole process", getrusage(RUSAGE_SELF).ru_maxrss * unit


def _sample_codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: sample(p.codes) for name, p in model.named_parameters() if isinstance(p, Int8Weight) and p.requires_grad
    }


def _command() -> list[str]:
    """The words the run was started with, if they say anything."""
    script, *words = sys.argv or [""]
    if script in ("", "-c") or Path(script).name in _NOTEBOOKS:
        return []
    shown, hide = ["python", Path(script).name], False
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if hide or word.startswith("hf_"):
            value = "***"
        hide = bool(option and not equals and _SECRET.search(option))
        if equals and _SECRET.search(option):
            value = "***"
        if Path(value).is_absolute():
            value = Path(value).name
        shown.append(f"{option}{equals}{value}")
    return shown


def _says_words(model: Any) -> bool:
    return bool(getattr(model, "can_generate", bool)())


def _is_sharded() -> bool:
    """Whether a process has only a part of the model, and cannot run it alone."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return AcceleratorState().distributed_type in sharded


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model for evaluation; modes of its modules and random numbers are given back."""
    modes, state = [(module, module.training) for module in model.modules()], _random_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        _set_random_state(state)


def _random_state() -> Any:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: Any) -> None:
    of_python, of_numpy, of_torch, cuda = state
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _warn_of_errors(what: str) -> Iterator[None]:
    """Training is worth more than its report."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"{what} of the training report: {type(error).__name__}: {error}. Training goes on.", stacklevel=2
        )
