"""Arithmetic on packed and on int8 weights: tensors in, tensors out, PyTorch only."""

from .int8.eager import (
    ERROR_FEEDBACK,
    NEAREST,
    STOCHASTIC,
    blocks_of,
    decode_blocks,
    encode_weight,
    random_residual,
    refresh_weight,
)
from .int8.operators import (
    accumulate_gradient,
    decode_weight,
    encode_gradient,
    int8_linear,
    int8_linear_grad_x,
    lion_step,
)
from .packed.eager import compute_dtype
from .packed.operators import dequantize, linear, lora_linear
from .rounding import random_key, round_scales, round_scales_straight_through


__all__ = [
    "ERROR_FEEDBACK",
    "NEAREST",
    "STOCHASTIC",
    "accumulate_gradient",
    "blocks_of",
    "compute_dtype",
    "decode_blocks",
    "decode_weight",
    "dequantize",
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
]
