"""QFT (Li et al., 2023, arXiv 2310.07147): full fine-tuning with weights, gradients and momentum in int8."""

from ..registry import register_quantization
from .config import QUANT_METHOD, QFTConfig
from .convert import convert_to_int8
from .gradients import GradientStack
from .lion import QuantizedLion
from .quantizer import QFTQuantizer
from .weight import Int8Weight


__all__ = [
    "GradientStack",
    "Int8Weight",
    "QFTConfig",
    "QFTQuantizer",
    "QuantizedLion",
    "convert_to_int8",
]


register_quantization(QUANT_METHOD, QFTConfig, QFTQuantizer)
