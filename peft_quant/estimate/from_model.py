"""Estimates the memory of a QFT training step of a loaded model."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..qft import QuantizedLion
from ..qft.lion import Rounding
from .count import AsOnAGpu
from .report import MemoryReport, dtype_name, make_report, precisions
from .subject import Subject, enable_checkpointing


logger = logging.getLogger(__name__)


def estimate_qft(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor] | None,
    *,
    fused: bool = False,
    state_bits: Literal[8, 32] = 8,
    rounding: Rounding = "stochastic",
    checkpointing: bool = False,
    autocast: bool = False,
) -> MemoryReport:
    """Estimate the memory of a QFT training step on one GPU, counted on a copy of the model on the meta device.

    If a step cannot be counted, for instance because experts are chosen by activation values, the report covers only
    weights, gradients and optimizer state, and the reason is logged.

    Args:
        model: the model, with int8 weights.
        inputs: inputs of its forward pass as meta tensors; None if they are unknown.
        fused: as in [`QFTTrainingArguments`].
        state_bits: 8, or 32 for momentum in fp32.
        rounding: how int8 weights are rounded, as in [`QFTTrainingArguments`].
        checkpointing: whether gradient checkpointing is on.
        autocast: whether autocast to bf16 is on.

    Returns:
        The report, with `peak_known` False if the step could not be counted.
    """
    known: dict[int, torch.Tensor] = {}
    parameters = {name: _without_values(p, known) for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name: _without_values(b, known) for name, b in model.named_buffers(remove_duplicate=False)}
    trained = [p for p in {id(p): p for p in parameters.values()}.values() if p.requires_grad]
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)

    def subject(twin: nn.Module, gpu: AsOnAGpu) -> Subject:
        lion = QuantizedLion(trained, fused=fused, state_bits=state_bits, rounding=rounding)
        return Subject(twin, gpu, vocabulary, lion)

    gpu = AsOnAGpu(autocast)
    with torch.random.fork_rng(devices=[]):  # models with LayerDrop draw random numbers on the CPU
        try:
            if inputs is None:
                raise ValueError("the inputs are not known before the first step")
            twin = _same_model(model, parameters, buffers, gpu if checkpointing else None)
            counted = subject(twin, gpu).train(inputs)
        except Exception as error:  # a model's own code may fail in any way on meta tensors
            logger.info("The peak of a training step is not estimated: %s: %s", type(error).__name__, error)
            counted = subject(_holding(known.values()), gpu).states()
    method = "qft-fused" if fused else "qft-stack"
    precision_of = precisions(method, dtype=dtype_name(model.dtype), state_bits=state_bits)
    return make_report(counted, sum(p.numel() for p in model.parameters()), precision_of)


def _holding(tensors: Iterable[torch.Tensor]) -> nn.Module:
    """A module that only holds these parameters and buffers."""
    module = nn.Module()
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(f"tensor{i}", tensor)
        else:
            module.register_buffer(f"tensor{i}", tensor)
    return module


def _without_values(tensor: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    """The tensor on the meta device; shared tensors stay shared."""
    if id(tensor) not in known:
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return known[id(tensor)]


def _same_model(
    model: Any,
    parameters: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    checkpointing: AsOnAGpu | None,
) -> PreTrainedModel:
    """Build the model from its config on the meta device, with these tensors.

    Raises:
        ValueError: the config makes a model with other tensor names.
    """
    config = copy.deepcopy(model.config)
    if config._attn_implementation != "eager":
        config._attn_implementation = "sdpa"  # the memory of its kernels is known
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about weights without values
        twin = type(model)._from_config(config, dtype=model.dtype)
        if checkpointing is not None:
            enable_checkpointing(twin, checkpointing)
    own, other = (
        {name for named in (m.named_parameters, m.named_buffers) for name, _ in named(remove_duplicate=False)}
        for m in (model, twin)
    )
    if own != other:
        raise ValueError(f"the config makes a {type(model).__name__} with other tensors, first {min(own ^ other)}")
    for name, tensor in (*parameters.items(), *buffers.items()):
        place, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(place), attribute, tensor)
    return twin
