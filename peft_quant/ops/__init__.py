"""Arithmetic on packed weights and on logits: tensors in, tensors out, PyTorch only."""

from .divergence import IGNORED, DistillationLoss, TopK, distillation_loss, top_k
from .eager import compute_dtype
from .int8 import (
    ERROR_FEEDBACK,
    NEAREST,
    STOCHASTIC,
    blocks_of,
    decode_blocks,
    encode_weight,
    random_residual,
    refresh_weight,
)
from .int8_library import (
    accumulate_gradient,
    decode_weight,
    encode_gradient,
    int8_linear,
    int8_linear_grad_x,
    lion_step,
)
from .library import dequantize, linear, lora_linear
from .rounding import random_key, round_scales, round_scales_straight_through


__all__ = [
    "ERROR_FEEDBACK",
    "IGNORED",
    "NEAREST",
    "STOCHASTIC",
    "DistillationLoss",
    "TopK",
    "accumulate_gradient",
    "blocks_of",
    "compute_dtype",
    "decode_blocks",
    "decode_weight",
    "dequantize",
    "distillation_loss",
    "encode_gradient",
    "encode_weight",
    "int8_linear",
    "int8_linear_grad_x",
    "linear",
    "lion_step",
    "lora_linear",
    "random_key",
    "random_residual",
    "refresh_weight",
    "round_scales",
    "round_scales_straight_through",
    "top_k",
]
