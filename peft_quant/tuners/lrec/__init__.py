"""LREC: a low-rank adapter beside packed weights."""

from ...registry import add_peft_type


_PEFT_TYPE = add_peft_type("LREC")  # before importing the configuration, which uses the type

from ...registry import allow_hotswap, register  # noqa: E402
from .config import LRECConfig  # noqa: E402
from .layer import LRECLinear  # noqa: E402
from .model import LRECModel  # noqa: E402


__all__ = [
    "LRECConfig",
    "LRECLinear",
    "LRECModel",
]

register("lrec", LRECConfig, LRECModel)
allow_hotswap(_PEFT_TYPE, ["base_fingerprint", "bias"])
