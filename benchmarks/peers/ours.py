"""peft_quant: PEQA, LREC, and PEFT's LoRA on prepared layers, all on packed weights; QFT on int8 weights."""

from __future__ import annotations

import argparse

import peft
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
from random_llama import PROJECTIONS, RandomPackedLinear, make_llama
from torch import nn

import peft_quant

from .lora import add_lora


def int8_linear(layer: nn.Linear, device: str, outlier_ratio: float = 0.01) -> nn.Linear:
    """A layer of random int8 weights, created directly in int8, so that no float weight is ever on the device."""
    rows, columns = layer.out_features, layer.in_features
    outliers = round(outlier_ratio * columns)
    index_dtype = torch.int16 if columns <= 1 << 15 else torch.int32
    weight = peft_quant.Int8Weight.from_parts(
        torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device),
        torch.rand(rows, 1, device=device).add_(0.5).mul_(0.06 / 127),
        torch.rand(rows, columns, device=device).topk(outliers).indices.sort().values.to(index_dtype),
        torch.randn(rows, outliers, device=device).mul_(0.08),
        dtype=torch.bfloat16,
    )
    layer.weight = nn.Parameter(weight)
    return layer


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    if cell.method.startswith("qft"):
        model = make_llama(cell.shape, device, lambda layer: int8_linear(layer, device), dense=False)
        return model.requires_grad_(True)
    model = make_llama(
        cell.shape,
        device,
        lambda layer: RandomPackedLinear(layer.in_features, layer.out_features, cell.bits, cell.group, device),
        dense=False,
    )
    if cell.method == "peqa":
        return peft.get_peft_model(model, peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
    if cell.method == "lrec":
        config = peft_quant.LRECConfig(
            task_type="CAUSAL_LM", r=cell.rank, lora_alpha=cell.rank, target_modules=PROJECTIONS
        )
        return peft.get_peft_model(model, config)
    peft_quant.prepare_gptq_for_training(model)
    return add_lora(model, cell.rank, {RandomPackedLinear: GPTQLoraLinear})
