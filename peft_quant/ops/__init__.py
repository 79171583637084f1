"""Arithmetic on packed and on int8 weights: tensors in, tensors out, PyTorch only."""

from .int8.autograd import Int8LinearFunction
from .int8.eager import decode_blocks, encode_weight, random_residual, refresh_weight
from .int8.operators import (
    ERROR_FEEDBACK,
    NEAREST,
    STOCHASTIC,
    EncodedWeight,
    LionStep,
    accumulate_gradient,
    blocks_of,
    decode_weight,
    encode_gradient,
    lion_step,
)
from .packed.autograd import linear, lora_linear
from .packed.operators import PackedWeight, dequantize
from .rounding import newly_clamped, random_key, round_scales, round_scales_straight_through


__all__ = [
    "ERROR_FEEDBACK",
    "NEAREST",
    "STOCHASTIC",
    "EncodedWeight",
    "Int8LinearFunction",
    "LionStep",
    "PackedWeight",
    "accumulate_gradient",
    "blocks_of",
    "decode_blocks",
    "decode_weight",
    "dequantize",
    "encode_gradient",
    "encode_weight",
    "linear",
    "lion_step",
    "lora_linear",
    "newly_clamped",
    "random_key",
    "random_residual",
    "refresh_weight",
    "round_scales",
    "round_scales_straight_through",
]
