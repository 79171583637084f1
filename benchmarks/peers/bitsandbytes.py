"""QLoRA: NF4 with double quantization. Everything except the adapters stays in bf16, which takes the least memory.

Also full fine-tuning of dense bf16 weights, with its 8-bit optimizers.
"""

from __future__ import annotations

import argparse

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from random_llama import make_llama
from torch import nn

from .lora import add_lora


def quantize(layer: nn.Linear, device: str) -> Linear4bit:
    quantized = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = Params4bit(layer.weight.data, quant_type="nf4", compress_statistics=True, module=quantized)
    return quantized.to(device)


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    if cell.method == "full":
        return make_llama(cell.shape, device).requires_grad_(True)
    model = make_llama(cell.shape, device, lambda layer: quantize(layer, device))
    model.is_loaded_in_4bit = True
    return add_lora(model, cell.rank)
