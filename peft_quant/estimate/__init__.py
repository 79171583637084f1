"""Estimates of the GPU memory of a training step, counted on the meta device."""

from .count import KINDS
from .from_config import Estimate, estimate_memory
from .from_model import estimate_qft
from .subject import METHODS, OPTIMIZERS


__all__ = ["KINDS", "METHODS", "OPTIMIZERS", "Estimate", "estimate_memory", "estimate_qft"]
