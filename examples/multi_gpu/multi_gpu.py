# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]"]
# ///
"""Tune a GPTQ model on several GPUs with the stock Trainer, and print tokens/s and memory of every process.

    accelerate launch --config_file ddp.yaml --num_processes 2 multi_gpu.py
    accelerate launch --config_file fsdp2.yaml --num_processes 2 multi_gpu.py

By ddp.yaml every process holds the packed model, by fsdp2.yaml a share of it; without GPUs the first one runs too. By
default SmolLM2-135M-Instruct in 4 bits is tuned on the King James Bible; with your own checkpoint, a path or a Hub id:

    accelerate launch --config_file ddp.yaml --num_processes 8 multi_gpu.py --model user/model-gptq-4bit

--smoke runs all of it in seconds, on a tiny random model, under `accelerate launch` or by itself.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import parse, versions  # noqa: I001

import demo_assets
import smoke_model
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from measure import windows
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
    parser.add_argument("--model", help="GPTQ checkpoint: path or Hub id; by default SmolLM2 in 4 bits")
    parser.add_argument("--method", choices=METHODS, default="peqa")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2, help="of each process")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, "multi_gpu", steps=3, sequence_length=64)

    training = TrainingArguments(
        output_dir=str(arguments.work_dir / "trainer"),
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
    assets: Any = smoke_model if arguments.smoke else demo_assets
    made = [None, None]
    if state.is_main_process:
        made = [str(arguments.model or assets.gptq_model()), assets.king_james()[0]]
    base, text = broadcast_object_list(made)
    set_seed(arguments.seed)
    model = load_model(base, device=state.device)
    model = get_peft_model(model, METHODS[arguments.method](task_type="CAUSAL_LM"))
    number = arguments.steps * arguments.batch_size * state.num_processes
    batch = windows(AutoTokenizer.from_pretrained(base), text, arguments.sequence_length, number)
    clock = Clock()
    trainer = Trainer(
        model,
        training,
        train_dataset=[{"input_ids": window, "labels": window} for window in batch],
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
    trainer.save_model(str(arguments.work_dir / "adapter"))

    tokens = (arguments.steps - 1) * arguments.batch_size * arguments.sequence_length
    own = {"process": state.process_index, "tokens/s": tokens / clock.seconds, **memory(model, state.device)}
    rows = gather_object([own])
    if state.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"\nloss of the first step {losses[0]:.4f}, of the last {losses[-1]:.4f}\n")
        print(f"| {' | '.join(own)} |\n|{'---|' * len(own)}")
        for row in rows:
            print(f"| {' | '.join(f'{value:,.4g}' for value in row.values())} |")
        print(f"\n{sum(row['tokens/s'] for row in rows):,.0f} tokens/s together\n\n{versions()}")
    trainer.accelerator.end_training()  # threads of the process group may abort a process that ends before them


if __name__ == "__main__":
    main()
