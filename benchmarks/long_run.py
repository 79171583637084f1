"""Memory of the process in a long run of each method, on a tiny model on the CPU, under transformers' Trainer.

    python benchmarks/long_run.py

Fails if, after the first row of a run, the resident memory grows by more than `MAX_GROWTH_MB` or the number of tensors
at all.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from peft import get_peft_model
from random_llama import RandomPackedLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from peft_quant import LRECConfig, PEQAConfig, QFTTrainer, QFTTrainingArguments, convert_to_int8


MAX_GROWTH_MB = 8.0
METHODS = ("peqa", "lrec", "qft-stack", "qft-fused")
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


class Recorder(TrainerCallback):
    """Resident memory and number of tensors, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[tuple[int, float, int, float]] = []
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            gc.collect()
            resident = psutil.Process().memory_info().rss / 1e6
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            self.rows.append((state.global_step, resident, tensors, time.perf_counter() - self.start))


def make_trainer(method: str, directory: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    ids = torch.randint(128, (64, 8)).tolist()
    options = {
        "output_dir": directory,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "per_device_train_batch_size": 2,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    if method.startswith("qft"):
        fused = method == "qft-fused"
        arguments = QFTTrainingArguments(**options, fused=fused, max_grad_norm=0.0 if fused else 1.0)
        return QFTTrainer(convert_to_int8(model), arguments, train_dataset=dataset)
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                packed = RandomPackedLinear(module.in_features, module.out_features, 4, 32, "cpu")
                setattr(block.get_submodule(parent), child, packed)
    config = PEQAConfig() if method == "peqa" else LRECConfig(r=4)
    return Trainer(get_peft_model(model, config), TrainingArguments(**options), train_dataset=dataset)


def run(method: str, steps: int, every: int) -> bool:
    """Print the table of one run; returns whether memory stayed."""
    recorder = Recorder(every)
    with TemporaryDirectory() as directory:
        trainer = make_trainer(method, directory, steps)
        trainer.add_callback(recorder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    print(f"\n| {method}: steps | resident MB | tensors | seconds |\n|---:|---:|---:|---:|")
    for step, resident, tensors, seconds in recorder.rows:
        print(f"| {step:,} | {resident:.1f} | {tensors:,} | {seconds:.0f} |")
    growth = max(row[1] for row in recorder.rows) - recorder.rows[0][1]
    more = max(row[2] for row in recorder.rows) - recorder.rows[0][2]
    print(f"after the first row: at most {growth:+.1f} MB, {more:+d} tensors", flush=True)
    return growth <= MAX_GROWTH_MB and more <= 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    options = parser.parse_args()
    flat = [run(method, options.steps, options.every) for method in options.method]
    sys.exit(0 if all(flat) else "memory grew")


if __name__ == "__main__":
    main()
