"""Arithmetic on packed weights: tensors in, tensors out, PyTorch only."""

from .library import dequantize, linear, lora_linear
from .rounding import round_scales, round_scales_straight_through


__all__ = ["dequantize", "linear", "lora_linear", "round_scales", "round_scales_straight_through"]
