"""The LoRA that every peer trains: on all linear layers of the blocks, in fp32."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from random_llama import PROJECTIONS
from torch import nn
from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel, rank: int, layers: dict[type[nn.Module], type[nn.Module]] | None = None
) -> PeftModel:
    """Add LoRA to a model; `layers` maps layer classes that PEFT does not know to their adapter classes."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    if layers:
        config._register_custom_module(layers)
    return get_peft_model(model, config)
