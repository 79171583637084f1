"""Initialization of a low-rank adapter as the best compensation for the quantization error."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from tqdm.auto import tqdm

from ....tables import markdown_table
from ..config import FLOAT_INITIALIZATIONS
from ..layer import LRECLinear
from .calibration import Covariances, covariances
from .float_weights import FloatWeights
from .low_rank import low_rank, pick_damping, squared_error


@dataclass(frozen=True)
class LayerInitialization:
    """The errors of one layer before and after initialization, each relative to the float layer.

    Attributes:
        name: the layer's name in the model.
        bits: bits per weight.
        rank: rank of the adapter.
        weight_error_before: Frobenius norm of the quantization error, divided by that of the float weight.
        weight_error_after: the same with the adapter.
        activation_error_before: root mean square of the output error on the held-out calibration tokens, divided by
            that of the float output; None without calibration tokens.
        activation_error_after: the same with the adapter.
        damping: damping of the covariance; infinite if the covariance was not used, None without calibration tokens.
    """

    name: str
    bits: int
    rank: int
    weight_error_before: float
    weight_error_after: float
    activation_error_before: float | None = None
    activation_error_after: float | None = None
    damping: float | None = None


@dataclass(frozen=True)
class InitializationReport:
    """The errors of every layer before and after initialization. Prints as a table.

    Attributes:
        start: the initialization, `"svd"` or `"whitened"`.
        layers: one row per layer.
    """

    start: str
    layers: list[LayerInitialization]

    def __iter__(self) -> Iterator[LayerInitialization]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_markdown(self) -> str:
        """A Markdown table of the errors, with the means over all layers in the last row."""
        header = ["layer", "bits", "rank", "weight error", "with adapter", "output error", "with adapter", "damping"]
        rows = []
        for row in self.layers:
            errors: list[float | None] = [row.weight_error_before, row.weight_error_after]
            errors += [row.activation_error_before, row.activation_error_after]
            rows.append([row.name, row.bits, row.rank, *errors, row.damping])
        means = [
            _mean([getattr(row, f"{kind}_error_{when}") for row in self.layers])
            for kind in ("weight", "activation")
            for when in ("before", "after")
        ]
        return markdown_table(header, [*rows, ["mean", None, None, *means, None]])

    __str__ = to_markdown


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def initialize_lrec_weights(
    model: nn.Module,
    float_model: str | os.PathLike[str] | nn.Module,
    start: str = "whitened",
    calibration: Iterable[Mapping[str, Any] | torch.Tensor] | None = None,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> InitializationReport:
    """Initialize an LREC adapter as the best low-rank compensation for the quantization error.

    The error is `E = W_float - W_dequantized`.

    `"svd"` makes `scaling * B A` of every layer the best approximation of `E` in Frobenius norm, its truncated
    singular value decomposition (Eckart and Young, 1936; for LoRA: LoftQ, Li et al., 2023, arXiv 2310.08659).

    `"whitened"` minimizes the error of the layer's output on calibration data, which weights `E` by the covariance of
    the layer's inputs (LQER, Zhang et al., 2024, arXiv 2402.02446; QERA, arXiv 2410.06040; EoRA, arXiv 2410.21271).
    Few tokens give a poor covariance, so it is damped, with the strength chosen per layer to minimize the error on
    held-out calibration tokens: every fourth sequence is held out, and plain `"svd"` is among the candidates. Inputs
    are taken from the quantized model without adapters. Theory: `peft_quant/tuners/lrec/initialization/low_rank.py`.

    The factors are balanced, `B^T B = A A^T`. The adapter is trained, saved and loaded like any other; its
    configuration records the initialization in `init_lrec_weights`, and loading needs no float weights. If an error is
    raised, the adapter is unchanged.

    Cost per layer: one fp64 eigendecomposition of `min(N, K)` dimensions; `"whitened"` takes seven, and one forward
    pass over the calibration data in total. Memory besides the model: the float weight and workspace of one layer;
    `"whitened"` also needs the covariances of one decoder block (two fp32 `[K, K]` per distinct input) and a hidden
    state for every calibration token.

    Args:
        model: a GPTQ model with an LREC adapter, from `get_peft_model`.
        float_model: the model that was quantized: directory or Hub id of its safetensors checkpoint, which is read one
            layer at a time, or the loaded model.
        start: the initialization, `"whitened"` or `"svd"`.
        calibration: batches of text like the model's intended input: dicts of the model's arguments, or `input_ids`,
            int64 `[sequences, tokens]`. At least two sequences; a hundred or more of the model's full length are
            typical. `"svd"` uses them only for its report.
        adapter_name: the adapter to initialize.
        revision: branch, tag or commit of `float_model`, if it is a Hub id.
        token: Hub token.

    Returns:
        The errors before and after. [`plot_layer_errors`] draws them.

    Raises:
        FileNotFoundError: `float_model` is a directory without a safetensors checkpoint.
        InvalidCheckpointError: one of its files is truncated.
        ValueError: there is no such adapter or initialization, calibration data is missing or not in batches, a rank
            exceeds a layer's size, or `float_model` lacks layers or is not the model that was quantized.

    Example:
        ```py
        >>> model = get_peft_model(model, peft_quant.LRECConfig(task_type="CAUSAL_LM", r=32))
        >>> report = peft_quant.initialize_lrec_weights(model, "user/model", calibration=dataloader)
        >>> peft_quant.plot_layer_errors(report, "errors.png")
        ```
    """
    if start not in FLOAT_INITIALIZATIONS:
        raise ValueError(
            f"start={start!r}: use 'whitened' or 'svd'. Without this function, adapters are initialized to zero."
        )
    if start == "whitened" and calibration is None:
        raise ValueError(
            "start='whitened' needs calibration data: pass `calibration=` batches of input_ids, or use start='svd'."
        )
    base = model.base_model if isinstance(model, PeftModel) else model
    base = base.model if isinstance(base, BaseTuner) else base
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, LRECLinear) and adapter_name in layer.lora_A
    }
    if not layers:
        known = sorted({name for layer in base.modules() if isinstance(layer, LRECLinear) for name in layer.lora_A})
        raise ValueError(f"The model has no LREC adapter named {adapter_name!r}; there are {known}.")
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    weights = FloatWeights(float_model, shapes, getattr(base, "base_model_prefix", ""), revision=revision, token=token)

    by_block: Iterable[tuple[list[str], dict[str, Covariances]]]
    by_block = [([name], {}) for name in layers] if calibration is None else covariances(base, layers, calibration)
    rows: dict[str, LayerInitialization] = {}
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with tqdm(total=len(layers), desc=f"LREC initialization ({start})", unit="layer") as progress:
        for names, inputs in by_block:
            for name in names:
                # popped, to free the covariances before the next block runs
                covariance = inputs.pop(name, None)
                layer = layers[name]
                factors[name], rows[name] = _initialize(name, layer, adapter_name, weights, start, covariance)
                del covariance
                progress.update()
    nearer = [row for row in rows.values() if row.weight_error_before < 1]
    if 2 * len(nearer) <= len(rows):
        raise ValueError(
            f"{weights} is not the model this GPTQ model was quantized from: in {len(rows) - len(nearer)} of "
            f"{len(rows)} layers the quantized weights are no nearer to its weights than zeros are. Pass the model "
            "that was quantized."
        )
    with torch.no_grad():
        for name, (lora_b, lora_a) in factors.items():
            layers[name].lora_B[adapter_name].weight.copy_(lora_b)
            layers[name].lora_A[adapter_name].weight.copy_(lora_a)
    configs: Any = model.peft_config
    configs[adapter_name] = copy(configs[adapter_name])  # the user's object may belong to other adapters too
    configs[adapter_name].init_lrec_weights = start
    return InitializationReport(start, [rows[name] for name in layers])


def _check_layer(name: str, layer: LRECLinear, adapter_name: str) -> None:
    rank, scaling = layer.r[adapter_name], float(layer.scaling[adapter_name])
    size = min(layer.out_features, layer.in_features)
    if rank > size:
        raise ValueError(
            f"r={rank} exceeds what {name} of shape {[layer.out_features, layer.in_features]} can have: use at most "
            f"{size}, for this layer alone with `rank_pattern`."
        )
    if scaling <= 0:
        raise ValueError(f"The adapter of {name} is scaled by {scaling:g}: use a positive `lora_alpha`.")
    if layer.lora_A[adapter_name].weight.is_meta:
        raise ValueError(
            f"The adapter of {name} is on the meta device: leave `low_cpu_mem_usage` out of `get_peft_model`."
        )


@torch.no_grad()
def _initialize(
    name: str,
    layer: LRECLinear,
    adapter_name: str,
    weights: FloatWeights,
    start: str,
    inputs: Covariances | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], LayerInitialization]:
    """Compute B and A of one layer, and its errors before and after."""
    rank = layer.r[adapter_name]
    weight, error = weights.error(name, layer.get_base_weight())
    if inputs is None:
        damping = None
        lora_b, lora_a = low_rank(error, rank)
    else:
        damping = pick_damping(error, rank, *inputs) if start == "whitened" else math.inf
        lora_b, lora_a = low_rank(error, rank, inputs.fit, damping)
    rest = error - lora_b @ lora_a
    row = LayerInitialization(
        name=name,
        bits=layer.packed.bits,
        rank=rank,
        weight_error_before=float(error.norm() / weight.norm()),
        weight_error_after=float(rest.norm() / weight.norm()),
        activation_error_before=None if inputs is None else _output_error(error, weight, inputs.held_out),
        activation_error_after=None if inputs is None else _output_error(rest, weight, inputs.held_out),
        damping=damping,
    )
    root = math.sqrt(layer.scaling[adapter_name])
    return (lora_b / root, lora_a / root), row


def _output_error(error: torch.Tensor, weight: torch.Tensor, covariance: torch.Tensor) -> float | None:
    size = squared_error(weight, covariance)
    return math.sqrt(max(0.0, squared_error(error, covariance)) / size) if size > 0 else None
