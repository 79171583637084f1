"""Perplexities of a GPTQ model compensated by LREC, by EoRA and with other losses, and then tuned on a task.

    python examples/demo_assets.py
    python benchmarks/quality/lrec.py --bits 3
    python benchmarks/quality/lrec.py --bits 2 --group-size 32 --asymmetric --output 2bit.json

SmolLM2-135M-Instruct is quantized and compensated on Wikipedia; the task is the King James Bible. All adapters have
the same rank, and all trained ones see the same tokens. Every stage is cached under --work-dir.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from eora import initialize_as_eora
from harness import FLOAT_MODEL, GENERAL, Stages, add_options, evaluate, windows, write_results
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, default_data_collator, set_seed

import peft_quant
from peft_quant.evaluation.loading import load_model
from peft_quant.evaluation.text import read_texts, token_windows
from peft_quant.gptq.quantize import quantize_checkpoint
from peft_quant.gptq.quantize_resume import state_beside


ROWS = {
    "eora": "EoRA",
    "svd": "initialized: svd",
    "whitened": "initialized: whitened",
    "ce": "text alone, from zero",
    "rilq": "RILQ's loss, from svd",
    "lrec-zero": "LREC from zero",
    "lrec-svd": "LREC from svd",
    "lrec-whitened": "LREC from whitened",
    "task-zero": "task: an adapter from zero",
    "task-continued": "task: the corrected adapter goes on",
    "task-second": "task: a second adapter over it",
}


class Run:
    """One base, its texts and everything trained on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work_dir
        self.float_model = arguments.assets / FLOAT_MODEL
        self.tokenizer = AutoTokenizer.from_pretrained(self.float_model)
        sources = {"general": arguments.assets / GENERAL, "task": arguments.assets / "king-james"}
        self.texts = {name: read_texts(source) for name, source in sources.items()}
        self.calibration = windows(self.tokenizer, self.texts["general"], 512, arguments.calibration)
        held_out = {name: read_texts(source, split="test") for name, source in sources.items()}
        if arguments.validation:
            for name, texts in self.texts.items():
                (text,) = texts["text"]
                cut = len(text) * 9 // 10
                self.texts[name] = Dataset.from_dict({"text": [text[:cut]]})
                held_out[name] = Dataset.from_dict({"text": [text[cut:]]})
        self.held_out = {
            name: windows(self.tokenizer, text, 512, arguments.windows) for name, text in held_out.items()
        }
        symmetry = "-asym" if arguments.asymmetric else ""
        self.base = self.work / f"gptq-{arguments.bits}bit-g{arguments.group_size}{symmetry}"
        tokens = f"{arguments.steps}x{arguments.batch_size}x{arguments.sequence_length}"
        self.settings = f"r{arguments.rank}-{tokens}-lr{arguments.learning_rate}-ce{arguments.ce_weight}"
        self.settings += f"-top{arguments.top_k}-seed{arguments.seed}{'-validation' * arguments.validation}"
        self.stages = Stages(self.work / f"results-{self.base.name}-{self.settings}.json")
        self.rows: dict[str, dict[str, float]] = {}

    def samples(self, text: str) -> Dataset:
        """As much of a text as the steps need; a shorter text is used whole and repeated."""
        number = self.arguments.steps * self.arguments.batch_size
        return token_windows(self.texts[text], self.tokenizer, self.arguments.sequence_length, number)

    def quantize(self) -> None:
        quantize_checkpoint(
            self.float_model,
            self.base,
            self.tokenizer.batch_decode(self.calibration),
            bits=self.arguments.bits,
            group_size=self.arguments.group_size,
            symmetric=not self.arguments.asymmetric,
            state=state_beside(self.base),
        )

    def adapter(self, name: str) -> Path:
        return self.work / f"{self.base.name}-{self.settings}-{name}"

    def evaluate(self, title: str, directory: Path | None = None) -> None:
        def perplexities() -> dict[str, float]:
            model = load_model(self.base)
            return evaluate(model if directory is None else PeftModel.from_pretrained(model, directory), self.held_out)

        self.rows[title] = self.stages.run(f"evaluate {title}", perplexities)

    def initialized(self, init: str) -> Path:
        """An adapter initialized to compensate the quantization error, without training."""
        directory = self.work / f"{self.base.name}-r{self.arguments.rank}-{init}"

        def make() -> None:
            model = get_peft_model(load_model(self.base), self.config())
            batches = self.calibration.split(16)
            if init == "eora":
                initialize_as_eora(model, self.float_model, batches)
            else:
                calibration = batches if init == "whitened" else None
                peft_quant.initialize_lrec_weights(model, self.float_model, init, calibration)
            model.save_pretrained(directory)

        if not directory.exists():
            self.stages.run(f"initialize: {init}", make, directory)
        return directory

    def config(self) -> peft_quant.LRECConfig:
        rank = self.arguments.rank
        return peft_quant.LRECConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank)

    def cache_teacher(self) -> Path:
        arguments, data = self.arguments, self.samples("general")
        name = f"teacher-{len(data)}x{arguments.sequence_length}-top{arguments.top_k}"
        directory = self.work / (name + "-validation" * arguments.validation)

        def make() -> None:
            teacher = load_model(self.float_model)
            peft_quant.cache_teacher(teacher, data, directory, k=arguments.top_k, tokenizer=self.tokenizer)

        self.stages.run("cache the teacher", make, directory)
        return directory

    def teacher(self, weights: dict[str, float]) -> Any:
        if weights.get("hidden_weight") or (weights["kl_weight"] and not self.arguments.top_k):
            return load_model(self.float_model)
        return self.cache_teacher() if weights["kl_weight"] else None

    def trainer_options(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.work / "checkpoints"),
            "max_steps": self.arguments.steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, self.arguments.steps // 10),
            "weight_decay": 0.0,
            "bf16": torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "logging_steps": max(1, self.arguments.steps // 10),
            "save_strategy": "no",
            "report_to": "none",
            "seed": self.arguments.seed,
        }

    def correct(self, name: str, init: Path | None, **weights: float) -> Path:
        """Train an adapter on general text with the given loss weights, from an initialization or from zero."""
        directory = self.adapter(name)

        def train() -> None:
            set_seed(self.arguments.seed)
            model: Any = load_model(self.base)
            if init is None:
                model = get_peft_model(model, self.config())
            else:
                model = PeftModel.from_pretrained(model, init, is_trainable=True)
            peft_quant.DistillationTrainer(
                model,
                peft_quant.DistillationTrainingArguments(**self.trainer_options(), **weights),
                teacher=self.teacher(weights),
                train_dataset=self.samples("general"),
                data_collator=default_data_collator,
            ).train()
            model.save_pretrained(directory)

        self.stages.run(f"train: {name}", train, directory)
        return directory

    def make(self, name: str) -> None:
        """Compute one row of the table, and the adapter it is initialized from."""
        loss = {"kl_weight": 1.0, "ce_weight": self.arguments.ce_weight}
        if name in ("eora", "svd", "whitened"):
            self.evaluate(name, self.initialized(name))
        elif name == "ce":
            self.evaluate(name, self.correct(name, None, kl_weight=0.0, ce_weight=1.0))
        elif name == "rilq":
            rilq = {"kl_weight": 0.0, "hidden_weight": 1.0, "ce_weight": 1.0}
            self.evaluate(name, self.correct(name, self.initialized("svd"), **rilq))
        elif name == "lrec-zero":
            self.evaluate(name, self.correct(name, None, **loss))
        elif name.startswith("lrec-"):
            self.evaluate(name, self.correct(name, self.initialized(name.removeprefix("lrec-")), **loss))
        elif name == "task-zero":
            self.learn_task(name, None)
        else:
            corrected = self.correct("lrec-whitened", self.initialized("whitened"), **loss)
            self.learn_task(name, corrected, second=name == "task-second")

    def learn_task(self, name: str, corrected: Path | None, second: bool = False) -> None:
        """Learn the task with the stock Trainer, in the corrected adapter or in a second one over the frozen first."""

        def train() -> dict[str, float]:
            set_seed(self.arguments.seed)
            model: Any = load_model(self.base)
            if corrected is None:
                model = get_peft_model(model, self.config())
            else:
                model = PeftModel.from_pretrained(model, corrected, is_trainable=not second)
            if second:
                model.add_adapter("task", self.config())
                model.base_model.set_adapter(["default", "task"])
                model.set_requires_grad("default", False)
            arguments = peft_quant.DistillationTrainingArguments(**self.trainer_options())
            data = self.samples("task")
            Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()
            return evaluate(model, self.held_out)

        self.rows[name] = self.stages.run(f"task: {name}", train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ce-weight", type=float, default=0.5, help="of the text itself in LREC's loss")
    parser.add_argument(
        "--top-k", type=int, default=64, help="log-probabilities kept of the teacher, each token; 0: it is asked anew"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[*ROWS], help="rows to make, of the adapters")
    parser.add_argument(
        "--validation", action="store_true", help="hold out the last tenth of the training texts, to choose options by"
    )
    add_options(parser, "quality-lrec")
    run = Run(parser.parse_args())

    if not run.base.exists():
        run.stages.run("quantize", run.quantize, run.base)
    run.rows["float"] = run.stages.run("evaluate float", lambda: evaluate(load_model(run.float_model), run.held_out))
    run.evaluate("gptq")
    for name in ROWS:
        if name in run.arguments.only:
            run.make(name)
    report(run)


def bits_per_weight(base: Path, adapter: Path) -> dict[str, float]:
    """Stored bits per quantized weight, in the checkpoint's tensors and in an adapter's file."""
    stored: dict[str, int] = {"qweight": 0, "scales": 0, "qzeros": 0, "adapter": 0}
    codes = 0
    for file in [*base.glob("*.safetensors"), adapter]:
        for name, tensor in load_file(file).items():
            part = "adapter" if file == adapter else name.rpartition(".")[2]
            if part in stored:
                stored[part] += 8 * tensor.numel() * tensor.element_size()
            if part == "qweight":
                codes += 32 * tensor.numel()
    weights = codes / json.loads((base / "config.json").read_text())["quantization_config"]["bits"]
    return {part: round(count / weights, 3) for part, count in stored.items()}


def report(run: Run) -> None:
    floor, base = run.rows["float"], run.rows["gptq"]
    print(f"\n{run.base.name}, {run.settings}\n")
    print("| held-out perplexity | Wikipedia | gap closed | King James |\n|---|---|---|---|")
    for name, row in run.rows.items():
        closed = (base["general"] - row["general"]) / (base["general"] - floor["general"])
        print(f"| {ROWS.get(name, name)} | {row['general']:.2f} | {closed:.0%} | {row['task']:.2f} |")
    adapters = run.work.glob(f"{run.base.name}-r{run.arguments.rank}-*/adapter_model.safetensors")
    bits = bits_per_weight(run.base, next(adapters))
    parts = ", ".join(f"{part} {value:.2f}" for part, value in bits.items())
    print(f"\nbits a weight: {parts}; together {sum(bits.values()):.2f}", flush=True)
    write_results(run.arguments, rows=run.rows, bits_per_weight=bits)


if __name__ == "__main__":
    main()
