"""Full fine-tuning of dense bf16 weights by PyTorch's optimizers: what QFT is compared to."""

from __future__ import annotations

import argparse

from random_llama import make_llama
from torch import nn


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    return make_llama(cell.shape, device).requires_grad_(True)
