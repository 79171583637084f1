"""Held-out losses of QFT and its ablations beside fp32 Lion and AdamW, bitsandbytes' Lion8bit, and LoRA.

    python examples/demo_assets.py
    python benchmarks/quality/qft.py                   # QFT and fp32 Lion
    python benchmarks/quality/qft.py --list
    python benchmarks/quality/qft.py --only QFT "fp32 Lion" --seeds 0 1 2 --output qft.json

SmolLM2-135M-Instruct is tuned; all rows of a seed see the same tokens in the same order. Every run is cached in its
own file under --work-dir, so that several processes can share the rows of a table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import FLOAT_MODEL, GENERAL, Stages, add_options, digest, evaluate, windows, write_results
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import peft_quant
from peft_quant.evaluation.text import read_texts, token_windows
from peft_quant.ops.reference import lion


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Lion(torch.optim.Optimizer):
    """Lion as in its paper, in fp32: the baseline for QFT."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    new = lion(parameter, parameter.grad, momentum, group["lr"], *group["betas"], 0.0)
                    parameter.copy_(new[0])
                    momentum.copy_(new[1])


@dataclass(frozen=True)
class Row:
    """A training method.

    Attributes:
        kind: kind of learning rate: AdamW and LoRA need larger ones than Lion.
        quantization: configuration of the int8 weights; None for fp32.
        arguments: further arguments of QFTTrainingArguments.
        on_gpu_only: whether it needs a GPU.
    """

    kind: str = "lion"
    quantization: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    on_gpu_only: bool = False


def _qft(quantization: dict[str, Any] | None = None, **arguments: Any) -> Row:
    return Row(quantization=quantization or {}, arguments=arguments)


ROWS = {
    "QFT": _qft(),
    "QFT, fused": _qft(fused=True),  # gradients stay in float: each is used and dropped
    "QFT, fp32 momentum": _qft(state_bits=32),
    "QFT, nearest rounding": _qft(rounding="nearest"),
    "QFT, error feedback": _qft(rounding="error_feedback"),
    "QFT, no outliers": _qft({"outlier_ratio": 0.0}),
    "QFT, 0.5 % outliers": _qft({"outlier_ratio": 0.005}),
    "QFT, 2 % outliers": _qft({"outlier_ratio": 0.02}),
    "QFT, int8 embeddings": _qft({"embeddings": True}),
    "QFT, refreshed": _qft(refresh_steps=10),
    "fp32 Lion": Row(),
    "fp32 AdamW": Row("adamw"),
    "bitsandbytes Lion8bit": Row(on_gpu_only=True),
    "LoRA, rank 16": Row("lora"),
}
TEXTS = {GENERAL: "Wikipedia", "king-james": "King James", "wordnet": "WordNet"}


@dataclass
class Settings:
    """The settings that identify a run; changing any of them trains again."""

    row: str
    text: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    dtype: str
    seed: int

    @property
    def name(self) -> str:
        words = self.row.replace(",", "").replace("%", "percent").lower().split()
        return "-".join([*words, digest(**asdict(self), options=asdict(ROWS[self.row]))])


def load_float(assets: Path, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        assets / FLOAT_MODEL, dtype=getattr(torch, dtype), device_map=DEVICE, **options
    )


def train(settings: Settings, held_out: dict[str, torch.Tensor], assets: Path, work: Path) -> dict[str, Any]:
    """Train one row and measure the loss on the held-out texts, by name."""
    row = ROWS[settings.row]
    tokenizer = AutoTokenizer.from_pretrained(assets / FLOAT_MODEL)
    set_seed(settings.seed)
    number = settings.steps * settings.batch_size
    dataset = token_windows(read_texts(assets / settings.text), tokenizer, settings.sequence_length, number)
    common: dict[str, Any] = {
        "output_dir": str(work / "trainer"),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, settings.steps // 10),
        "weight_decay": 0.0,
        # Lion uses signs, so clipping changes little, and a fused step cannot clip
        "max_grad_norm": 0.0 if row.kind == "lion" else 1.0,
        "logging_steps": max(1, settings.steps // 10),
        "save_strategy": "no",
        "dataloader_pin_memory": DEVICE == "cuda",
        "report_to": "none",
        "seed": settings.seed,
    }
    options = {"train_dataset": dataset, "data_collator": default_data_collator, "processing_class": tokenizer}
    if row.quantization is not None:
        config = peft_quant.QFTConfig(**row.quantization)
        model = load_float(assets, settings.dtype, quantization_config=config)
        arguments = peft_quant.QFTTrainingArguments(**common, **row.arguments)
        trainer: Trainer = peft_quant.QFTTrainer(model, arguments, **options)
    else:
        model = load_float(assets)
        if row.kind == "lora":
            model = get_peft_model(
                model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            )
        optimizer = make_optimizer(settings, model)
        trainer = Trainer(model, TrainingArguments(**common), optimizers=(optimizer, None), **options)
    before = losses(model, held_out)
    trainer.train()
    return {"before": before, "after": losses(model, held_out)}


def make_optimizer(settings: Settings, model: PreTrainedModel) -> torch.optim.Optimizer | None:
    """The optimizers that Trainer does not offer; None for its own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.row == "bitsandbytes Lion8bit":
        from bitsandbytes.optim import Lion8bit

        return Lion8bit(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), min_8bit_size=1)
    return Lion(parameters, settings.learning_rate) if ROWS[settings.row].kind == "lion" else None


def losses(model: Any, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: math.log(perplexity) for name, perplexity in evaluate(model, held_out).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=("king-james", "wordnet"), default="king-james", help="to tune on")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=["QFT", "fp32 Lion"], metavar="ROW", help="to train"
    )
    parser.add_argument("--all", action="store_true", help="train all rows that can be on this machine")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--lion-learning-rate", type=float, default=2e-5, help="of QFT and Lion")
    parser.add_argument("--adamw-learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if DEVICE == "cuda" else "float32",
        help="of QFT's float parameters and products; other rows are fp32",
    )
    add_options(parser, "quality-qft")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(ROWS))
        return

    tokenizer = AutoTokenizer.from_pretrained(arguments.assets / FLOAT_MODEL)
    held_out = {
        TEXTS[text]: windows(tokenizer, read_texts(arguments.assets / text, split="test"), 512, arguments.windows)
        for text in (arguments.text, GENERAL)
    }
    finished: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        for seed in arguments.seeds:
            rate = getattr(arguments, f"{ROWS[row].kind}_learning_rate")
            shape = (arguments.steps, arguments.batch_size, arguments.sequence_length)
            run = Settings(row, arguments.text, *shape, rate, arguments.dtype, seed)
            # one file per run, so that processes do not share one
            stages = Stages(arguments.work_dir / f"windows-{arguments.windows}" / f"{run.name}.json")
            if arguments.all or row in arguments.only:
                if ROWS[row].on_gpu_only and DEVICE == "cpu":
                    print(f"{row}: needs a GPU, left out")
                    break
                stages.run("train", partial(train, run, held_out, arguments.assets, arguments.work_dir))
            if stages.results:
                finished.setdefault(row, []).append({"seed": seed, **stages.results["train"]})
    print(f"\n| held-out loss, nats a token | seed | {' | '.join(held_out)} |\n|---|---|---|---|")
    for row, runs in finished.items():
        for run in runs:
            for when in ("before", "after"):
                cells = " | ".join(f"{loss:.4f}" for loss in run[when].values())
                print(f"| {row}, {when} | {run['seed']} | {cells} |")
    write_results(arguments, text=TEXTS[arguments.text], rows=finished)


if __name__ == "__main__":
    main()
