"""PEQA: fine-tuning of quantization scales."""

from ...registry import add_peft_type


add_peft_type("PEQA")  # before importing the configuration, which uses the type

from ...registry import register  # noqa: E402
from .config import PEQAConfig  # noqa: E402
from .layer import PEQALayer, PEQALinear  # noqa: E402
from .model import PEQAModel  # noqa: E402


__all__ = ["PEQAConfig", "PEQALayer", "PEQALinear", "PEQAModel"]

register("peqa", PEQAConfig, PEQAModel)
