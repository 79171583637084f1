"""Small models in int8, and short runs of QFTTrainer."""

from __future__ import annotations

import torch
from gptq_models import float_llama
from quick_training import SETTINGS, sequences
from torch import nn

from peft_quant import Int8Weight, QFTArguments, QFTConfig, QFTTrainer, quantize_model


def int8_llama(config: QFTConfig | None = None, dtype: torch.dtype = torch.bfloat16, **options) -> nn.Module:
    """[`float_llama`] in int8; the frequencies of its positions stay fp32, as in a model that is loaded."""
    model = float_llama(**options)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = None
    model.to(dtype).model.rotary_emb = rotary
    return quantize_model(model, config)


def trainer(directory, model=None, trainer_class=QFTTrainer, trainer_options=None, **settings):
    arguments = QFTArguments(str(directory), **{**SETTINGS, "max_steps": 4, "learning_rate": 1e-3, **settings})
    options = {"train_dataset": sequences(), "eval_dataset": sequences(4), **(trainer_options or {})}
    return trainer_class(int8_llama() if model is None else model, arguments, **options)


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a model is made of, copied."""
    found = {}
    for name, tensor in model.state_dict().items():
        parts = tensor.parts if isinstance(tensor, Int8Weight) else {"": tensor}
        found |= {f"{name} {part}": value.clone() for part, value in parts.items()}
    return found


def assert_equal(model: nn.Module, other: nn.Module | dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    expected = other if isinstance(other, dict) else contents(other)
    found = contents(model)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
