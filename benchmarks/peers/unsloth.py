"""Unsloth's QLoRA (NF4, its own loss, attention and checkpointing), from a checkpoint of random weights.

Imported before transformers and PEFT, which it patches. The bf16 checkpoint is kept in `.cache` for the next run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path


CACHE = Path(".cache/benchmarks").absolute()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(CACHE / "unsloth_compiled"))

import unsloth  # noqa: E402, I001
import torch  # noqa: E402
from random_llama import PROJECTIONS, save  # noqa: E402
from torch import nn  # noqa: E402


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    directory = CACHE / f"llama-{cell.shape}"
    if not directory.exists():
        # in a separate process, which unsloth does not patch
        process = multiprocessing.get_context("spawn").Process(target=save, args=(cell.shape, directory))
        process.start()
        process.join()
    checkpointing = ("unsloth" if cell.offload else True) if cell.checkpointing else False
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(directory),
        max_seq_length=cell.seq,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
        use_exact_model_name=True,
        use_gradient_checkpointing=checkpointing,
        device_map={"": 0 if device == "cuda" else device},
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=cell.rank,
        lora_alpha=cell.rank,
        lora_dropout=0,
        bias="none",
        target_modules=PROJECTIONS,
        use_gradient_checkpointing=checkpointing,
    )
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    return model
