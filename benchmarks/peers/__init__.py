"""What is measured: our methods, and those of other packages on the same model.

A module a peer, named after its package. Each has `build(cell, device)`, which gives the model to train.
"""

from __future__ import annotations


METHODS = {
    "ours": ("peqa", "lora", "lrec"),
    "peft": ("lora",),
    "gptqmodel": ("lora", "peqa"),
    "bitsandbytes": ("lora",),
    "hqq": ("lora",),
    "unsloth": ("lora",),
}
