"""EoRA as gptqmodel computes it, in an LREC adapter, so that both are measured the same way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from gptqmodel.eora.eora import eora_compute_lora
from peft import PeftModel

from peft_quant.tuners.lrec.initialization.calibration import covariances
from peft_quant.tuners.lrec.initialization.float_weights import FloatWeights
from peft_quant.tuners.lrec.layer import LRECLinear


@torch.no_grad()
def initialize_as_eora(model: PeftModel, float_model: Path, calibration: Iterable[torch.Tensor]) -> None:
    """Set an adapter to the low-rank matrices of EoRA (arXiv 2410.21271), from the covariance of all the data.

    Args:
        model: a GPTQ model with an LREC adapter of scaling 1 (`lora_alpha` equal to the rank).
        float_model: directory of the model that was quantized.
        calibration: batches of `input_ids`.
    """
    base = model.base_model.model
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LRECLinear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    weights = FloatWeights(float_model, shapes, base.base_model_prefix)
    found = {}
    for names, inputs in covariances(base, layers, calibration):
        for name in names:
            fit, held_out = inputs.pop(name)
            _, error = weights.error(name, layers[name].get_base_weight())
            share = 1 / 4  # share of held-out sequences
            covariance = (1 - share) * fit + share * held_out
            rank = layers[name].r["default"]
            found[name] = eora_compute_lora(error, name, covariance, rank, torch.float32, error.device)
    for name, (lora_a, lora_b) in found.items():
        layers[name].lora_A["default"].weight.copy_(lora_a)
        layers[name].lora_B["default"].weight.copy_(lora_b)
