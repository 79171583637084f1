"""QFT (Li et al., 2023, arXiv 2310.07147): every parameter tuned, with weights, gradients and momentum in int8."""

from pathlib import Path
from typing import Any

from ..registry import register_quantization, write_cards_of_quantized
from ..report.card import QFT, update_card
from .config import QUANT_METHOD, QFTConfig
from .export import LogitError, export_qft
from .gradients import GradientStack
from .lion import QuantizedLion
from .memory import memory_report
from .quantize import quantize_model
from .quantizer import QFTQuantizer
from .weight import Int8Weight


__all__ = [
    "GradientStack",
    "Int8Weight",
    "LogitError",
    "QFTConfig",
    "QFTQuantizer",
    "QuantizedLion",
    "export_qft",
    "memory_report",
    "quantize_model",
]


def _write_card(model: Any, directory: Path, earlier: list[str], repository: str) -> None:
    update_card(directory, earlier, [model.config._name_or_path], repository, {"method": QFT})


register_quantization(QUANT_METHOD, QFTConfig, QFTQuantizer)
write_cards_of_quantized(QFTQuantizer, _write_card)
