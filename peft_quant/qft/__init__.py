"""QFT (Li et al., 2023, arXiv 2310.07147): every parameter tuned, with weights, gradients and momentum in int8."""

from .gradients import GradientStack
from .lion import QuantizedLion
from .weight import Int8Weight


__all__ = ["GradientStack", "Int8Weight", "QuantizedLion"]
