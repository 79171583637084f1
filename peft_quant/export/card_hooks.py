"""Model cards of what PEFT and transformers save and push."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..qft.quantizer import QFTQuantizer
from ..registry import write_cards, write_cards_of_quantized
from ..tuners.model import PackedTuner
from .card import QFT, update_card


def _write_adapter_card(tuner: PackedTuner, directory: Path, earlier: list[str], repository: str | None) -> None:
    base = getattr(getattr(tuner.model, "config", None), "_name_or_path", None)
    tags = getattr(tuner.model, "model_tags", None)
    config = next(iter(tuner.peft_config.values()))
    facts = {"base_quantization": config.base_quantization}  # which a LoRA adapter's file does not say
    update_card(directory, earlier, [base], repository, facts, metadata={"tags": tags or None}, exported=True)


def _write_int8_card(model: PreTrainedModel, directory: Path, earlier: list[str], repository: str) -> None:
    update_card(directory, earlier, [model.config._name_or_path], repository, {"method": QFT})


write_cards(PackedTuner, _write_adapter_card)
write_cards_of_quantized(QFTQuantizer, _write_int8_card)
