"""HQQ with LoRA: groups along the input, decoded by its compiled backend in forward and again in backward."""

from __future__ import annotations

import argparse

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from random_llama import make_llama
from torch import nn

from .lora import add_lora


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    HQQLinear.set_backend(HQQBackend.PYTORCH_COMPILE)
    config = BaseQuantizeConfig(nbits=cell.bits, group_size=cell.group, axis=1)
    config["weight_quant_params"]["optimize"] = False  # slow, and useless for random weights

    def quantize(layer: nn.Linear) -> HQQLinear:
        return HQQLinear(layer, config, compute_dtype=torch.bfloat16, device=device)

    model = make_llama(cell.shape, device, quantize)
    model.hqq_quantized = True
    return add_lora(model, cell.rank)
