"""Arithmetic on packed weights and on logits: tensors in, tensors out, PyTorch only."""

from .divergence import IGNORED, DistillationLoss, TopK, distillation_loss, top_k
from .library import dequantize, linear, lora_linear
from .rounding import round_scales, round_scales_straight_through


__all__ = [
    "IGNORED",
    "DistillationLoss",
    "TopK",
    "dequantize",
    "distillation_loss",
    "linear",
    "lora_linear",
    "round_scales",
    "round_scales_straight_through",
    "top_k",
]
