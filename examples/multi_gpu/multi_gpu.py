# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]"]
# ///
"""Tune a GPTQ model on several GPUs with the stock Trainer, and print tokens/s and memory of every process.

    accelerate launch --config_file ddp.yaml --num_processes 8 multi_gpu.py --model user/gptq-model --data user/data
    accelerate launch --config_file fsdp2.yaml --num_processes 8 multi_gpu.py --model user/gptq-model --data user/data

By ddp.yaml every process holds the packed model, by fsdp2.yaml a share of it; without GPUs the first one runs too. The
model and the text are each a path or a Hub id. `python examples/demo_assets.py` makes some:
`--model .cache/assets/smollm2-135m-instruct-gptq-4bit --data .cache/assets/king-james`.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import is_torch_greater_or_equal

import peft_quant
from peft_quant.evaluation.loading import load_model
from peft_quant.evaluation.text import read_texts, token_windows


METHODS = {"peqa": peft_quant.PEQAConfig, "lrec": peft_quant.LRECConfig}
PACKED = ("qweight", "qzeros", "scales", "g_idx")


class Clock(TrainerCallback):
    """Seconds of the steps after the first, which warms up."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == 1:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - self.start


def packed_as_parameters(model: nn.Module) -> None:
    """Turn packed tensors from buffers, which FSDP leaves whole in every process, into parameters, which it shards."""
    for module in model.modules():
        for name in PACKED:
            if name in module._buffers:
                module.register_parameter(name, nn.Parameter(module._buffers.pop(name), requires_grad=False))


def memory(model: nn.Module, device: torch.device) -> dict[str, float]:
    """MB of this process: its packed tensors, and the most it took, on a GPU without what CUDA itself takes."""
    packed = [t for name, t in chain(model.named_parameters(), model.named_buffers()) if name.split(".")[-1] in PACKED]
    shards = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in packed]
    unit = 1 if sys.platform == "darwin" else 1024
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else on_cpu
    return {"packed MB": sum(shard.nbytes for shard in shards) / 1e6, "peak MB": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--data", required=True, help="text file, directory or Hub data set, its split train")
    parser.add_argument("--method", choices=METHODS, default="peqa")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2, help="of each process")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".cache/multi_gpu"), help="directory for the adapter")
    arguments = parser.parse_args()

    training = TrainingArguments(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        weight_decay=0.0,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=arguments.seed,
    )
    state = PartialState()
    set_seed(arguments.seed)
    model = load_model(arguments.model, device=state.device)
    model = get_peft_model(model, METHODS[arguments.method](task_type="CAUSAL_LM"))
    number = arguments.steps * arguments.batch_size * state.num_processes
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with state.main_process_first():  # the others read what it leaves in the cache of datasets
        data = token_windows(read_texts(arguments.data), tokenizer, arguments.sequence_length, number)
    clock = Clock()
    trainer = Trainer(
        model,
        training,
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    if trainer.is_fsdp_enabled:
        if not is_torch_greater_or_equal("2.13"):
            raise SystemExit(f"FSDP2 of PyTorch {torch.__version__} cannot shard integers: take 2.13, or ddp.yaml.")
        packed_as_parameters(model)
        # FSDP's own way to bf16 would round the scales to it as well
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        if training.bf16:
            model.forward = torch.autocast(state.device.type, torch.bfloat16)(model.forward)
    trainer.train()
    trainer.save_model(str(arguments.out / "adapter"))

    tokens = (arguments.steps - 1) * arguments.batch_size * arguments.sequence_length
    own = {"process": state.process_index, "tokens/s": tokens / clock.seconds, **memory(model, state.device)}
    rows = gather_object([own])
    if state.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"\nloss of the first step {losses[0]:.4f}, of the last {losses[-1]:.4f}\n")
        print(f"| {' | '.join(own)} |\n|{'---|' * len(own)}")
        for row in rows:
            print(f"| {' | '.join(f'{value:,.4g}' for value in row.values())} |")
        print(f"\n{sum(row['tokens/s'] for row in rows):,.0f} tokens/s together")
    trainer.accelerator.end_training()  # threads of the process group may abort a process that ends before them


if __name__ == "__main__":
    main()
