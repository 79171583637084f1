"""gptqmodel's trainable layers, which decode each weight with compiled PyTorch code and keep it for backward.

`lora` is PEFT's LoRA on these layers; `peqa` trains scales the naive way, as bf16 parameters of the layers.
"""

from __future__ import annotations

import argparse

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from random_llama import RandomPackedLinear, make_llama
from torch import nn

from peft_quant.ops.packed.packing import pack_zeros

from .lora import add_lora


def random_layer(rows: int, columns: int, bits: int, group_size: int, device: str) -> TorchLinear:
    """A symmetric layer of random codes. gptqmodel's kernels expect v2 zero points."""
    packed = RandomPackedLinear(rows, columns, bits, group_size, device)
    layer = TorchLinear(bits, group_size, True, False, rows, columns, bias=False).to(device)
    zeros = torch.full_like(packed.scales, 2 ** (bits - 1), dtype=torch.int32)
    layer.qweight, layer.g_idx = packed.qweight, packed.g_idx
    layer.qzeros = pack_zeros(zeros, bits, 0)
    layer.scales = packed.scales.bfloat16()
    layer.qzero_format(format=2)
    layer.post_init()
    return layer


def build(cell: argparse.Namespace, device: str) -> nn.Module:
    model = make_llama(
        cell.shape,
        device,
        lambda layer: random_layer(layer.in_features, layer.out_features, cell.bits, cell.group, device),
        dense=False,
    )
    if cell.method == "lora":
        model.quantization_method = "gptq"
        return add_lora(model, cell.rank)
    for layer in model.modules():
        if isinstance(layer, TorchLinear):
            scales = layer.scales
            del layer.scales
            layer.scales = nn.Parameter(scales)
    return model
