"""Full fine-tuning of dense bf16 weights with PyTorch's optimizers: the baseline for QFT."""

from __future__ import annotations

import argparse

from random_llama import make_llama
from torch import nn


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    return make_llama(cell.shape, device).requires_grad_(True)
