"""Will it fit? The memory of a training run, counted on a model without values."""

from .count import KINDS
from .from_config import Estimate, estimate_memory, read_config
from .from_model import estimate_qft
from .subject import METHODS, OPTIMIZERS


__all__ = ["KINDS", "METHODS", "OPTIMIZERS", "Estimate", "estimate_memory", "estimate_qft", "read_config"]
