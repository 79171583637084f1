"""Full fine-tuning in int8 with transformers' Trainer or a subclass of it."""

from __future__ import annotations

import inspect
import logging
import math
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from .. import ops
from ..docstrings import help_from_docstring
from ..estimate import estimate_qft
from ..estimate.report import MemoryReport
from ..export.card import QFT, Card, best_effort, update_card
from ..export.int8 import LogitError, export_qft
from ..export.saving import replaced_checkpoint
from ..files import require_space, temporary_directory
from ..first_step import Int8Snapshot, StepsWithoutGradient
from ..optimizer_steps import SkippedSteps
from ..qft.checkpoint import layout_difference, loading_difference
from ..qft.dry_run import first_rows_only, require_readable
from ..qft.lion import QuantizedLion
from ..qft.weight import Int8Weight
from .interrupt import last_complete_checkpoint


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

_ROUNDINGS = ("stochastic", "nearest", "error_feedback")
_STATE = "trainer_state.json"
_FEW = 1e-3  # share of the int8 weights that must move in an epoch


@help_from_docstring
@dataclass
class QFTTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] and the quantization of training.

    The optimizer is always QuantizedLion: `learning_rate`, `weight_decay`, the scheduler's options and `max_grad_norm`
    apply as usual, `optim` and Adam's options do not. Lion's learning rates are 3 to 10 times smaller than AdamW's.

    Args:
        fused (`bool`):
            Update each weight during backward, as soon as its gradient exists, and keep no gradients. Excludes
            gradient accumulation and `max_grad_norm`.
        state_bits (`int`): Bits of the momentum: 8 for int8, 32 for fp32.
        rounding (`str`):
            How weights are rounded: "stochastic"; "nearest", which drops updates below half a step; or
            "error_feedback", which stores the rounding error in int8 and adds it to the next update.
        lion_beta1 (`float`): Weight of the momentum in Lion's update.
        lion_beta2 (`float`): Decay rate of Lion's momentum.
        refresh_steps (`int`):
            Optimizer steps after which scales and outliers of each weight are chosen again; 0 for never.
        max_parameter_norm (`float`): With `fused`, clip each weight's gradient to this norm; 0 for no clipping.

    Raises:
        ValueError: incompatible options, or fp16, whose loss scaling needs float gradients.
    """

    fused: bool = False
    state_bits: int = field(default=8, metadata={"choices": [8, 32]})
    rounding: str = field(default="stochastic", metadata={"choices": list(_ROUNDINGS)})
    lion_beta1: float = 0.9
    lion_beta2: float = 0.99
    refresh_steps: int = 100
    max_parameter_norm: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("state_bits", (8, 32)), ("rounding", _ROUNDINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(str, allowed))}.")
        for name in ("lion_beta1", "lion_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use a number from 0 to below 1.")
        for name in ("refresh_steps", "max_parameter_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: use 0 or a positive number.")
        if self.fp16:
            raise ValueError("fp16 needs its loss scaled and float gradients to unscale: train with bf16=True.")
        if self.fused and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} needs the gradients that fused=True "
                "does not keep: set fused=False, or a larger per_device_train_batch_size."
            )
        if self.fused and self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} needs the norm of all gradients before the first update, and "
                "fused=True updates as they come: set max_grad_norm=0, and max_parameter_norm to clip each weight's "
                "gradient on its own."
            )
        if self.max_parameter_norm and not self.fused:
            raise ValueError(
                f"max_parameter_norm={self.max_parameter_norm} belongs to fused=True: use max_grad_norm, which clips "
                "the norm of all gradients."
            )


class QFTTrainerMixin(_Base):
    """Makes a subclass of transformers' Trainer train in int8.

    Put it before that trainer, as in `class QFTSFTTrainer(QFTTrainerMixin, SFTTrainer)`, and combine the arguments, as
    in `class Config(SFTConfig, QFTTrainingArguments)`. See [`QFTTrainer`].
    """

    args: Any  # QFTTrainingArguments
    model: Any
    memory_report: MemoryReport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("optimizers", "optimizer_cls_and_kwargs"):
            given = kwargs.get(name)
            if given is not None and any(part is not None for part in given):
                raise ValueError(
                    f"`{name}` was given, but weights in int8 need QuantizedLion, which is made from the arguments: "
                    "leave it out, and choose a scheduler by lr_scheduler_type."
                )
        super().__init__(*args, **kwargs)
        _check_arguments(self)
        _check_model(self.model)
        self._lion: QuantizedLion | None = None
        self.add_callback(_TrainerHooks(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._lion = self.optimizer = self._make_lion(self.model if model is None else model)
        return self.optimizer

    def _make_lion(self, model: nn.Module) -> QuantizedLion:
        args = self.args
        decayed = set(self.get_decay_parameter_names(model))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]
        return QuantizedLion(
            [group for group in groups if group["params"]],
            lr=args.learning_rate,
            betas=(args.lion_beta1, args.lion_beta2),
            rounding=args.rounding,
            state_bits=args.state_bits,
            fused=args.fused,
            max_parameter_norm=args.max_parameter_norm or None,
            refresh_steps=args.refresh_steps,
            seed=args.seed,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No complete checkpoint found in {self.args.output_dir}: train without resume_from_checkpoint."
                )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._lion is not None:
                self._lion.gradients.detach()

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self._optimizer().clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self.args.fused:
            return self._optimizer().gradients.norm()
        return grad_norm

    def _optimizer(self) -> QuantizedLion:
        if self._lion is None:
            raise RuntimeError("The optimizer is made by train(): call that first.")
        return self._lion

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._lion is not None:
            logs["skipped_steps"] = self._lion.skipped_steps
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        with replaced_checkpoint(directory) as unfinished:
            super()._save(os.fspath(unfinished), state_dict)
        with best_effort(directory):
            self._write_card(directory, [Card.read(directory)])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        directory = Path(self.args.output_dir)
        with best_effort(directory):
            earlier = Card.read(directory)
            super().create_model_card(*args, **kwargs)
            if (directory / "config.json").is_file():
                self._write_card(directory, [earlier, Card.read(directory)])

    def _write_card(self, directory: Path, earlier: list[Card]) -> None:
        names = ("rounding", "fused", "state_bits", "refresh_steps", "weight_decay", "max_grad_norm")
        settings = {
            **extract_hyperparameters_from_trainer(self),
            "optimizer": f"QuantizedLion, betas {self.args.lion_beta1}, {self.args.lion_beta2}",
            **{name: getattr(self.args, name) for name in names},
        }
        facts = {"method": QFT, "settings": settings}
        update_card(directory, earlier, [self.model.config._name_or_path], self.hub_model_id, facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _load_weights(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        logger.info("Loading the best model, %s", best)
        _load_weights(self.model, best)

    def export(
        self, output_dir: str | os.PathLike[str], format: Literal["bf16", "gptq"] = "bf16"
    ) -> LogitError | None:
        """Write the model as a checkpoint that loads without peft_quant, and log the error of its logits.

        The error is measured on the first evaluation batch, or on the first training batch without evaluation data.

        Args:
            output_dir: directory to write, as in [`export_qft`].
            format: `"bf16"` or `"gptq"`.

        Returns:
            The logit error.

        Raises:
            FileExistsError, ValueError: as [`export_qft`].
        """
        dataset = self.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        loader = self.get_train_dataloader() if dataset is None else self.get_eval_dataloader(dataset)
        inputs = self._prepare_inputs(next(iter(loader)))
        error = export_qft(self.model, output_dir, format, inputs=inputs, tokenizer=self.processing_class)
        if error is not None:
            self.log({f"{format}_logit_error_{name}": value for name, value in asdict(error).items()})
        return error

    def _begin(self) -> None:
        """Report the memory and check the run before the first step."""
        lion = self._optimizer()
        lion.gradients.detach()  # drops gradients of an interrupted step
        for group in lion.param_groups:
            lion.gradients.attach(group["params"])  # accelerate may have moved the model since
        self.memory_report = memory_of_step(self.model, self.args, self.train_dataset)
        logger.info("Trained in int8:\n%s", self.memory_report)
        _warn_of_small_steps(self.model, self.args, self.state.max_steps / max(self.state.num_train_epochs, 1))
        if self.args.should_save and self.state.global_step == 0:
            self._try_to_save()

    def _try_to_save(self) -> None:
        """Test saving and loading before training, so that a run does not fail at its end.

        Writes a checkpoint of the first rows of every tensor, and loads one of full shapes without values.

        Raises:
            OSError: there is not enough space for a full checkpoint.
            RuntimeError: writing or reading failed.
        """
        output = Path(self.args.output_dir)
        way_out = "Make room, choose another output_dir, or set save_only_model=True, which saves no momentum"
        needed = _checkpoint_bytes(self.model, self.args)
        require_space(output, needed, "A checkpoint", way_out)
        with temporary_directory(output, "dry-run", output) as directory:
            place = os.fspath(directory)
            try:
                with first_rows_only(self.model):
                    super()._save(place)
                if not self.args.save_only_model:
                    self._save_optimizer_and_scheduler(place)
                    self._save_rng_state(place)
                self.state.save_to_json(os.fspath(directory / _STATE))
            except Exception as error:
                raise RuntimeError(
                    f"Checkpoints of this run cannot be saved, tried before the first step: {error}"
                ) from error
            try:
                require_readable(self.model, directory)
            except Exception as error:
                raise RuntimeError(
                    f"Checkpoints of this run cannot be read back, tried before the first step: {error}. "
                    f"`from_pretrained` makes a {type(self.model).__name__} of its config alone: build the model "
                    "from a config that says all that it has, or undo what was changed in it."
                ) from error


class QFTTrainer(QFTTrainerMixin, Trainer):
    """Trains every parameter, with weights, gradients and Lion's momentum in int8.

    This is QFT (Li et al., 2023, arXiv 2310.07147). Each gradient is quantized as soon as it exists and kept until the
    step in one byte per weight; with `fused`, its weight is updated immediately instead. Accumulation and
    `max_grad_norm` (unless fused), schedulers, bf16, gradient checkpointing, evaluation, callbacks and resuming work
    as in [`~transformers.Trainer`]. `save_model` writes an int8 checkpoint that `from_pretrained` loads after
    `import peft_quant`; [`export`] writes checkpoints that load without it.

    Before the first step, the memory by kind of tensor is logged and stored in `memory_report`, a checkpoint of the
    first rows of every tensor is written and removed, and one of full shapes is loaded without values. After the first
    step, the trained parameters must have moved. A step with gradients that are not finite is skipped; the logs count
    these as `skipped_steps`, and ten in a row end training.

    Args:
        model: a model with int8 weights, from [`convert_to_int8`] or an int8 checkpoint.
        args ([`QFTTrainingArguments`]): training arguments with the quantization options.
        kwargs: as for [`~transformers.Trainer`], without an optimizer.

    Raises:
        TypeError: `args` has the wrong type.
        ValueError: the model has no int8 weights, an optimizer was passed, or there are several GPUs or processes.
        TrainingError (from `train`): after the first step, nothing had moved, or a frozen parameter had; or ten
            steps in a row were skipped.

    Example:
        ```py
        >>> from peft_quant import QFTTrainingArguments, QFTTrainer, convert_to_int8

        >>> model = convert_to_int8(AutoModelForCausalLM.from_pretrained("user/model", dtype="bfloat16"))
        >>> args = QFTTrainingArguments(output_dir="out", learning_rate=2e-5, max_steps=500)
        >>> QFTTrainer(model, args, train_dataset=dataset).train()
        ```
    """


class _TrainerHooks(TrainerCallback):
    """Calls the trainer at events for which transformers has callbacks but no methods."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.proven = False
        self.snapshot: Int8Snapshot | None = None
        self.without_gradient = StepsWithoutGradient()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin()
        self.skipped = SkippedSteps()
        self.skipped_before = self.trainer._optimizer().skipped_steps

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.proven:
            return
        lion = self.trainer._optimizer()
        rates = {id(p): float(group["lr"]) for group in lion.param_groups for p in group["params"]}
        if max(rates.values(), default=0) > 0:
            self.snapshot = Int8Snapshot(self.trainer.model, rates, stochastic=lion.rounding == "stochastic")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        lion = self.trainer._optimizer()
        before, self.skipped_before = self.skipped_before, lion.skipped_steps
        skipped = self.skipped_before > before
        self.skipped.count(skipped)
        if self.snapshot is None or skipped or self.without_gradient.wait(not lion.has_momentum):
            return
        snapshot, self.snapshot, self.proven = self.snapshot, None, True
        snapshot.check()


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    if not isinstance(args, QFTTrainingArguments):
        raise TypeError(f"`args` is a {type(args).__name__}: use QFTTrainingArguments, which says what is quantized.")
    if args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):  # the defaults
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} was asked for, but weights in int8 need QuantizedLion: "
            "leave it out."
        )
    if trainer.accelerator.mixed_precision == "fp16":
        raise ValueError("accelerate is set to fp16, which needs float gradients to unscale: use bf16.")
    if args.n_gpu > 1 or args.world_size > 1:
        raise ValueError(
            f"QFTTrainer trains on one device, and this run has {max(args.n_gpu, args.world_size)}: set "
            "CUDA_VISIBLE_DEVICES=0, and start a single process."
        )


def _check_model(model: Any) -> None:
    if not any(isinstance(parameter, Int8Weight) for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no weights in int8: use `convert_to_int8(model)`, or load an int8 checkpoint."
        )
    if not hasattr(model, "hf_quantizer"):
        raise ValueError(
            f"{type(model).__name__} was not put into int8 by `convert_to_int8` or `from_pretrained` of transformers' "
            "models, which is what QFTTrainer saves and loads. Train it with QuantizedLion in a loop of your own."
        )


def _load_weights(model: PreTrainedModel, directory: str) -> None:
    """Load a checkpoint's weights into a model, bit for bit.

    Raises:
        ValueError: the checkpoint is of another model, or its int8 weights or their layouts differ.
    """
    model_class: Any = type(model)
    options = {"dtype": torch.float32, "output_loading_info": True}  # fp32 represents every 16-bit float exactly
    saved, found = model_class.from_pretrained(directory, **options)
    difference = loading_difference(found)
    if difference:
        raise ValueError(
            f"{directory} is a checkpoint of another model than this {model_class.__name__}: {difference}. Resume "
            "from one of this model's own."
        )
    difference = layout_difference(model, saved)
    if difference:
        raise ValueError(
            f"{directory} is a checkpoint of another policy: {difference}. Load the model with "
            f'`from_pretrained("{directory}")` and train that.'
        )
    model.load_state_dict(saved.state_dict())


def _warn_of_small_steps(model: nn.Module, args: QFTTrainingArguments, steps: float) -> None:
    """Warn if an epoch would move almost no int8 weights."""
    values, moved = 0, 0.0
    for weight in model.parameters():
        if isinstance(weight, Int8Weight) and weight.requires_grad:
            ratios = args.learning_rate / weight.scales.abs()
            if args.rounding == "stochastic":
                share = float((steps * ratios).clamp(max=1).mean())
            else:
                # error feedback resolves 1/256 of a code
                least = 0.5 if args.rounding == "nearest" else 2**-9
                share = float((ratios > least).float().mean())
            values += weight.numel()
            moved += share * weight.numel()
    if values and moved / values < _FEW:
        warnings.warn(
            f"learning_rate={args.learning_rate:g} with rounding={args.rounding!r} moves {moved / values:.1e} of the "
            f"int8 weights in an epoch of {steps:.0f} steps, so they hardly train. Raise the learning rate"
            + (", or use stochastic rounding." if args.rounding != "stochastic" else "."),
            stacklevel=3,
        )


def _checkpoint_bytes(model: nn.Module, args: QFTTrainingArguments) -> int:
    weights = sum(p.bytes_held if isinstance(p, Int8Weight) else p.nbytes for p in model.parameters())
    if args.save_only_model:
        return weights
    trained = [p for p in model.parameters() if p.requires_grad]
    momentum = sum(p.numel() * args.state_bits // 8 + 4 * ops.blocks_of(p.numel()) for p in trained)
    rounding_errors = sum(p.numel() for p in trained if isinstance(p, Int8Weight))
    return weights + momentum + (rounding_errors if args.rounding == "error_feedback" else 0)


def memory_of_step(model: Any, args: Any, dataset: Any) -> MemoryReport:
    """Estimate the memory of a training step, with batches shaped like the first training sample."""
    return estimate_qft(
        model,
        _first_batch(model, dataset, args.per_device_train_batch_size),
        fused=args.fused,
        state_bits=args.state_bits,
        rounding=args.rounding,
        checkpointing=args.gradient_checkpointing,
        autocast=args.bf16,
    )


def _first_batch(model: Any, dataset: Any, size: int) -> dict[str, torch.Tensor] | None:
    """A meta-device batch shaped like the first sample; None if the sample does not show the model's inputs."""
    if not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    known = inspect.signature(type(model).forward).parameters
    try:
        sample = {name: torch.as_tensor(value) for name, value in dataset[0].items() if name in known}
    except (AttributeError, TypeError, ValueError, RuntimeError):  # only the collator can convert it
        return None
    if "labels" in known and "input_ids" in sample:
        sample.setdefault("labels", sample["input_ids"])
    return {name: torch.empty(size, *t.shape, dtype=t.dtype, device="meta") for name, t in sample.items()}
