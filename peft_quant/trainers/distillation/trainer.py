"""A Trainer that distills the float model into an LREC adapter of the quantized one."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ...docstrings import help_from_docstring
from ...optimizer_steps import skipped_steps
from ...tuners.lrec.layer import LRECLinear
from .cache import CachedTeacher, data_fingerprint
from .loss import IGNORED, distillation_loss
from .teacher import ModelTeacher, last_hidden_state, tokenizer_fingerprint


logger = logging.getLogger(__name__)

_TERMS = ("kl", "ce", "hidden")
_COMMON = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@help_from_docstring
@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] and the weights of [`DistillationTrainer`]'s loss.

    Every term is a mean per predicted token, so the weights do not depend on sequence length, batch size or number of
    accumulation steps. INT2.1 sums KL over a sequence and averages the cross entropy: its cross-entropy weights of 10
    (4 bits) to 120 (2 bits), on sequences of 2048 tokens, correspond to a `ce_weight` of 0.005 to 0.06 here.

    Args:
        kl_weight (`float`): Weight of KL(teacher || student), which is multiplied by `temperature ** 2`.
        ce_weight (`float`): Weight of the next-token cross entropy.
        hidden_weight (`float`):
            Weight of the squared difference of the last hidden states, averaged over features (RILQ, arXiv
            2412.01129). Needs the teacher model, not a cache.
        temperature (`float`): Temperature that divides the logits of teacher and student in KL.

    Raises:
        ValueError: a negative weight, all weights zero, a temperature that is not positive, or
            `label_smoothing_factor`, which this loss does not support.
    """

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {f"{term}_weight": getattr(self, f"{term}_weight") for term in _TERMS}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight}: use 0 or a positive number.")
        if not any(weights.values()):
            raise ValueError(f"{weights} leave nothing to learn from: set at least one above 0.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: use a positive number.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported by DistillationTrainer's "
                "loss: leave it at 0."
            )


class DistillationTrainer(Trainer):
    """Distills the float model into the LREC adapter of a GPTQ model (INT2.1, Chai et al., 2023, arXiv 2306.08162).

    The loss is

        loss = kl_weight * KL(teacher || student) + ce_weight * CE + hidden_weight * MSE(last hidden states)

    Each term is a mean per predicted token. A token is predicted if its label is not -100 and `attention_mask`
    excludes neither it nor the token before. Training logs and evaluation metrics have `kl`, `ce` and, if used,
    `hidden` in addition to the loss; evaluation averages over all tokens, not over batches. Training logs also count
    `skipped_steps`, whose gradients were not finite.

    The student's logits are overwritten with their gradient in chunks, so that only one such tensor exists.

    Args:
        model: the student, a causal language model with a trainable LREC adapter.
        args ([`DistillationTrainingArguments`]): training arguments with the weights of the loss.
        teacher: the float model that was quantized, in memory or offloaded by accelerate (`device_map`,
            `cpu_offload`, `disk_offload`), which streams it block by block; or the directory of a cache written by
            [`cache_teacher`] with every sample to train and evaluate on. Its memory is logged. Not needed if only
            `ce_weight` is above 0.
        teacher_processing_class: the teacher's tokenizer, which is compared with `processing_class`. A cache records
            its teacher's tokenizer.
        kwargs: as for [`~transformers.Trainer`]. Batches need `labels`.

    Raises:
        TypeError: `args` or `teacher` has the wrong type.
        ValueError: no trainable LREC adapter; a teacher of another architecture, vocabulary or tokenizer; a cache that
            is incomplete, damaged, for other data or another temperature; `hidden_weight` with a cache; options that
            replace the loss.

    Example:
        ```py
        >>> from peft_quant import DistillationTrainer, DistillationTrainingArguments

        >>> teacher = AutoModelForCausalLM.from_pretrained("user/model", dtype="bfloat16")
        >>> args = DistillationTrainingArguments(output_dir="out", learning_rate=1e-4, max_steps=500)
        >>> DistillationTrainer(model, args, teacher=teacher, train_dataset=dataset).train()
        ```
    """

    loss_is_scaled_for_ga = True
    args: DistillationTrainingArguments
    model: Any

    def __init__(
        self,
        model: nn.Module,
        args: DistillationTrainingArguments,
        *,
        teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(
                f"`args` is a {type(args).__name__}: use DistillationTrainingArguments, which has the weights."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace DistillationTrainer's loss: use a plain Trainer.")
        _check_student(model)
        self.teacher = _open_teacher(teacher, args)
        given = tokenizer_fingerprint(teacher_processing_class)
        if isinstance(self.teacher, ModelTeacher):
            _check_architecture(self.teacher.model, model)
        elif self.teacher is not None:
            _check_cache(self.teacher, model, args)
            for name in ("train_dataset", "eval_dataset"):
                _check_samples(self.teacher, kwargs.get(name), name)
            given = given or self.teacher.manifest["tokenizer"]
        _check_tokenizers(given, tokenizer_fingerprint(kwargs.get("processing_class")))
        super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process would use {self.args.n_gpu} GPUs (DataParallel), which DistillationTrainer does not "
                "support: start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0."
            )
        self.model_accepts_loss_kwargs = True  # makes the Trainer count tokens over all accumulation steps
        self._terms = _TERMS[self.teacher is None : 3 if args.hidden_weight else 2]
        self._reset_logs()
        self._batches: deque[dict[str, Any]] = deque(maxlen=args.gradient_accumulation_steps)  # of the current step
        self._evaluated = self._zero_sums()
        if self.teacher is not None:
            logger.info(str(self.teacher))
            self.teacher.to(self.args.device)
            self.add_callback(_TeacherCheck(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._reset_logs()
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        targets = next_tokens(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        wants_hidden = self.args.hidden_weight > 0
        target = None if self.teacher is None else self.teacher(inputs, wants_hidden)
        with last_hidden_state(self.accelerator.unwrap_model(model), wants_hidden) as states:
            outputs = model(**inputs)
        logits = outputs.logits.clone() if return_outputs and torch.is_grad_enabled() else outputs.logits
        loss, kl, ce = distillation_loss(
            logits,
            targets,
            None if target is None else target.distribution,
            kl_weight=self.args.kl_weight,
            ce_weight=self.args.ce_weight,
            temperature=self.args.temperature,
        )
        sums = {"kl": kl, "ce": ce}
        scored = targets != IGNORED
        if target is not None and target.hidden is not None:
            hidden = (states[-1][scored].float() - target.hidden[scored].float()).square().mean(-1).sum()
            sums["hidden"] = hidden.detach()
            loss = loss + self.args.hidden_weight * hidden
        values = torch.stack([sums[term] for term in self._terms])
        if not model.training:
            self._evaluated += torch.cat([values, scored.sum()[None]])
        scale = 1 / scored.sum().clamp(min=1)
        if num_items_in_batch is not None:
            # gradients are averaged over processes, token counts are summed
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            scale = processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if model.training:
            self._trained += values * scale
            self._steps.add(self.state.global_step)
            self._batches.append(inputs)
        loss = loss * scale
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated = self._zero_sums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        *sums, tokens = self.accelerator.gather(self._evaluated[None]).sum(0).tolist()
        if tokens and output.metrics is not None:
            means = {term: value / tokens for term, value in zip(self._terms, sums)}
            weighted = [getattr(self.args, f"{term}_weight") * mean for term, mean in means.items()]
            output.metrics[f"{metric_key_prefix}_loss"] = sum(weighted)
            output.metrics.update({f"{metric_key_prefix}_{term}": mean for term, mean in means.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps:
            means = self.accelerator.gather(self._trained[None]).mean(0) / len(self._steps)
            logs.update(zip(self._terms, means.tolist()))
            logs["skipped_steps"] = skipped_steps(self.model)
            self._reset_logs()
        super().log(logs, *args, **kwargs)

    def _reset_logs(self) -> None:
        self._steps: set[int] = set()
        self._trained = torch.zeros(len(self._terms), device=self.args.device)

    def _zero_sums(self) -> torch.Tensor:
        return torch.zeros(len(self._terms) + 1, device=self.args.device)  # one per term, and the number of tokens

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        targets = [next_tokens(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch([{"labels": t, "shift_labels": t} for t in targets], device)


class _TeacherCheck(TrainerCallback):
    """Names the teacher where its output is the reason that a step was skipped."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.skipped = skipped_steps(self.trainer.model)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        before, self.skipped = self.skipped, skipped_steps(self.trainer.model)
        if self.skipped == before:
            return
        teacher: Any = self.trainer.teacher
        # every batch in every process, as processes may share the teacher's weights
        found = [teacher(batch).has_nan() for batch in self.trainer._batches]
        if any(found):
            logger.warning(
                "The output of the teacher is not finite for a batch of the step that was skipped: use it in bf16 or "
                "fp32 if it is in fp16, and make its cache again if it has one."
            )


def next_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """The token to predict at each position of a batch, `[..., T]`; -100 where there is none or it is masked.

    Raises:
        ValueError: the batch has no labels.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"The batch has {sorted(batch)} and no `labels`, which mark the tokens that count: use "
            "`DataCollatorForLanguageModeling(tokenizer, mlm=False)`, or a `labels` column like `input_ids`."
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORED)
    targets = functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
    if mask is not None and mask.shape == labels.shape:
        targets = targets.masked_fill(mask == 0, IGNORED)
    return targets


def _open_teacher(teacher: Any, args: DistillationTrainingArguments) -> ModelTeacher | CachedTeacher | None:
    if teacher is None:
        if args.kl_weight or args.hidden_weight:
            raise ValueError(
                f"kl_weight={args.kl_weight} and hidden_weight={args.hidden_weight} need a teacher: give the float "
                "model or the directory of a cache made by `cache_teacher`."
            )
        return None
    return CachedTeacher(teacher) if isinstance(teacher, (str, os.PathLike)) else ModelTeacher(teacher)


def _check_student(model: Any) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is not a causal language model, which DistillationTrainer needs.")
    layers = [layer for layer in model.modules() if isinstance(layer, LRECLinear) and layer.lora_B]
    if not any(matrix.weight.requires_grad for layer in layers for matrix in layer.lora_B.values()):
        raise ValueError(
            f"{type(model).__name__} has no trainable LREC adapter ({len(layers)} frozen layers): use "
            "`get_peft_model(model, LRECConfig(...))`, or `PeftModel.from_pretrained(..., is_trainable=True)`."
        )


def _check_architecture(teacher: PreTrainedModel, student: Any) -> None:
    of_teacher, of_student = (
        {name: getattr(model.config.get_text_config(), name, None) for name in _COMMON} for model in (teacher, student)
    )
    different = [name for name in _COMMON if of_teacher[name] != of_student[name]]
    if different:
        raise ValueError(
            f"The teacher has {', '.join(f'{name}={of_teacher[name]!r}' for name in different)}, the student "
            f"{', '.join(f'{name}={of_student[name]!r}' for name in different)}: use the model that was quantized."
        )


def _check_tokenizers(of_teacher: str | None, of_student: str | None) -> None:
    if of_teacher and of_student and of_teacher != of_student:
        raise ValueError(
            f"The teacher's tokenizer has the vocabulary {of_teacher}, the student's {of_student}: use the teacher's "
            "for both."
        )


def _check_cache(cache: CachedTeacher, student: Any, args: DistillationTrainingArguments) -> None:
    if args.hidden_weight:
        raise ValueError(
            f"hidden_weight={args.hidden_weight} needs a live teacher: a cache has no hidden states. Give the float "
            "model, offloaded if it is too large, or set hidden_weight=0."
        )
    vocab_size = student.config.get_text_config().vocab_size
    if cache.manifest["vocab_size"] != vocab_size:
        raise ValueError(
            f"The teacher of the cache {cache.directory} has a vocabulary of {cache.manifest['vocab_size']}, the "
            f"student one of {vocab_size}: use the model that was quantized."
        )
    if cache.manifest["temperature"] != args.temperature:
        raise ValueError(
            f"The teacher cache {cache.directory} is for temperature={cache.manifest['temperature']}, asked for was "
            f"{args.temperature}. The entries that a cache leaves out are unknown at another temperature: train at "
            "its own, or make another with `cache_teacher(..., temperature=...)`."
        )


def _check_samples(cache: CachedTeacher, dataset: Any, name: str) -> None:
    """Check that a cache has all samples of a dataset, if it has token ids before collation."""
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            _check_samples(cache, part, f"{name}[{key!r}]")
    elif hasattr(dataset, "__len__") and len(dataset) and "input_ids" in dataset[0]:
        missing = sum(sample not in cache for sample in dataset)
        if missing:
            raise ValueError(
                f"The teacher cache {cache.directory} (data {cache.manifest['data']}) lacks {missing} of the "
                f"{len(dataset)} samples of {name} (data {data_fingerprint(dataset)}). Make one that has all samples "
                "to train and evaluate on: `cache_teacher(teacher, concatenate_datasets([train, eval]), ...)`."
            )
