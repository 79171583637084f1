"""peft_quant: PEQA, LREC, and PEFT's LoRA on prepared layers, all on packed weights."""

from __future__ import annotations

import argparse

import peft
from peft.tuners.lora.gptq import GPTQLoraLinear
from random_llama import PROJECTIONS, PackedLinear, make_llama
from torch import nn

import peft_quant

from .lora import add_lora


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    model = make_llama(
        cell.shape,
        device,
        lambda layer: PackedLinear(layer.in_features, layer.out_features, cell.bits, cell.group, device),
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
    return add_lora(model, cell.rank, {PackedLinear: GPTQLoraLinear})
