"""PEFT's LoRA on dense bf16 weights: the baseline for quantization."""

from __future__ import annotations

import argparse

from random_llama import make_llama
from torch import nn

from .lora import add_lora


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    return add_lora(make_llama(cell.shape, device), cell.rank)
