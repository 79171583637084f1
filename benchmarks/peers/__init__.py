"""What is measured: our methods, and those of other packages on the same model.

A module a peer, named after its package. Each has `build(cell, device)`, which gives the model to train.
"""

from __future__ import annotations


METHODS = {
    "ours": ("peqa", "lora", "lrec", "qft-stack", "qft-fused"),
    "peft": ("lora",),
    "torch": ("full",),
    "gptqmodel": ("lora", "peqa"),
    "bitsandbytes": ("lora", "full"),
    "hqq": ("lora",),
    "unsloth": ("lora",),
}
