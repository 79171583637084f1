"""The methods under test: ours, and those of other packages on the same model.

One module per peer, named after its package. Each has `build(cell, device)`, which returns the model to train.
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
