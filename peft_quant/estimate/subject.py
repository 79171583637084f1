"""A model on the meta device, prepared for a training method, whose training step is counted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Set
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..ops import blocks_of
from ..qft import Int8Weight, QFTConfig, QuantizedLion
from ..qft.policy import int8_modules
from ..tuners.layer import AdaptedLinear
from ..tuners.lrec import LRECConfig
from ..tuners.peqa import PEQAConfig
from .count import (
    ADAPTER,
    AFTER_BACKWARD,
    GRADIENTS,
    OPTIMIZER,
    REST,
    SCALES,
    WEIGHTS,
    Amounts,
    AsOnAGpu,
    LiveTensors,
    Shapes,
)
from .layers import NF4Linear, PackedLinear, QLoraLinear, int8_weight


METHODS = ("peqa", "lrec", "qft-stack", "qft-fused", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw8bit")
_SMALLEST_IN_8_BITS = 4096


class Subject:
    """A model on the meta device and its optimizer.

    Args:
        model: the model, on the meta device.
        gpu: the mode in which it runs.
        vocabulary: size of the vocabulary, the width of its logits.
        optimizer: a `QuantizedLion` of the model's parameters, or one of `OPTIMIZERS`.
        weights: `id`s of float parameters to count as weights instead of as the rest of the model.
        edge: number of first and of last decoder blocks that have events of their own; blocks in between have none.
    """

    def __init__(
        self,
        model: nn.Module,
        gpu: AsOnAGpu,
        vocabulary: int,
        optimizer: QuantizedLion | str,
        weights: Set[int] = frozenset(),
        edge: int = sys.maxsize,
    ) -> None:
        self._model, self._gpu, self._vocabulary = model.train(), gpu, vocabulary
        self._weights, self._edge = weights, edge
        self._shapes = Shapes()
        self._live: LiveTensors | None = None
        self._watch(blocks_of_model(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        self._lion = None
        if isinstance(optimizer, QuantizedLion):
            self._lion = optimizer
            self._states = [t for p in trained for t in optimizer._state(p).values()]
        else:
            self._states = [state for p in trained for state in _adam_states(p, optimizer)]

    def train(self, inputs: Mapping[str, torch.Tensor]) -> dict[Hashable, Amounts]:
        """Count a training step after the first one: forward, backward and optimizer.

        Args:
            inputs: inputs of the model on the meta device, with `input_ids` `[B, L]`.

        Returns:
            The amounts at the peak of each interval of the step, by the event that ends it, and, under
            `AFTER_BACKWARD`, those between backward and the optimizer step.
        """
        self._live = live = LiveTensors(inputs["input_ids"].numel(), self._vocabulary, self._shapes)
        self._hold(live)
        with live:
            with self._gpu.forward():
                loss = self._model(**inputs, use_cache=False).loss
            live.mark(["forward"])
            torch.autograd.backward(loss)
            del loss
            live.mark(["backward"])
            live.peaks[AFTER_BACKWARD] = live.amounts()
            if self._lion is not None:
                if not self._lion.fused:
                    self._lion.clip_grad_norm_(1.0)
                self._lion.step()
            (self._lion or self._model).zero_grad()
            live.mark(["step"])
        self._live = None
        return live.peaks

    def states(self) -> dict[Hashable, Amounts]:
        """Count QFT's states between backward and the optimizer step, without running a step."""
        live = LiveTensors(0, self._vocabulary, self._shapes)
        self._hold(live)
        with live:
            if self._lion is not None and not self._lion.fused:
                for parameter in self._model.parameters():
                    if parameter.requires_grad:
                        gradient = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                        self._lion.gradients.push(parameter, gradient)
            return {AFTER_BACKWARD: live.amounts()}

    def _hold(self, live: LiveTensors) -> None:
        for parameter in self._model.parameters():
            if isinstance(parameter, Int8Weight):
                for part, tensor in parameter.parts.items():
                    live.hold(tensor, WEIGHTS if part == "codes" else SCALES)
            elif id(parameter) in self._weights:
                live.hold(parameter, WEIGHTS)
            else:
                live.hold(parameter, ADAPTER if parameter.requires_grad and self._lion is None else REST)
        for module in self._model.modules():
            quantized = isinstance(module, (PackedLinear, NF4Linear))
            for name, buffer in module.named_buffers(recurse=False):
                if isinstance(module, (PackedLinear, NF4Linear)) and name == "qweight":
                    live.hold(buffer, WEIGHTS, module.in_features * module.out_features)
                else:
                    live.hold(buffer, SCALES if quantized and name != "bias" else REST)
        for state in self._states:
            live.hold(state, OPTIMIZER)

    def _watch(self, blocks: list[nn.Module]) -> None:
        """Register hooks by which blocks and gradients end intervals."""
        places = {id(p): (name, i) for i, block in enumerate(blocks) for name, p in block.named_parameters()}
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(self._ends([("block", *place) for place in self._places(i, len(blocks))]))
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            events: list[Hashable] = [name]
            if id(parameter) in places:
                name, i = places[id(parameter)]
                events = [(name, *place) for place in self._places(i, len(blocks))]
            parameter.register_post_accumulate_grad_hook(self._ends(events))
        if self._gpu.autocast:
            for module in self._model.modules():
                if isinstance(module, AdaptedLinear):  # the meta device has no autocast
                    module.register_forward_pre_hook(lambda _, inputs: tuple(map(self._gpu.cast, inputs)))

    def _places(self, i: int, blocks: int) -> list[tuple[str, int]]:
        """The positions of block `i` counted from the first and from the last, if less than `edge`."""
        places = (("first", i), ("last", blocks - 1 - i))
        return [place for place in places if place[1] < self._edge]

    def _ends(self, events: list[Hashable]) -> Callable[..., None]:
        def end(subject: Any, *_: Any) -> None:
            if self._live is not None:
                gradient = getattr(subject, "grad", None)
                if isinstance(gradient, torch.Tensor):
                    self._live.hold(gradient, GRADIENTS)
                self._live.mark(events)

        return end


def planned_subject(
    config: PretrainedConfig,
    method: str,
    edge: int,
    *,
    bits: int,
    group_size: int,
    rank: int,
    checkpointing: bool,
    optimizer: str,
) -> tuple[Subject, int]:
    """A config's model prepared for a method, and its number of parameters; arguments as in `Estimate`."""
    gpu = AsOnAGpu(autocast=not method.startswith("qft"))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about weights without values
        model = _float_model(config)
        parameters = sum(p.numel() for p in model.parameters())
        blocks = blocks_of_model(model)
        _check(model, blocks, config.num_hidden_layers)
        if checkpointing:
            enable_checkpointing(model, gpu)
        layers = _linear_layers(model, blocks)
        weights = {id(layer.weight) for layer in layers.values()}
        model = _adapt(model, layers, method, bits, group_size, rank)
    trains: Any = optimizer
    if method.startswith("qft"):
        trains = QuantizedLion(model.parameters(), fused=method == "qft-fused")
    return Subject(model, gpu, config.vocab_size, trains, weights, edge), parameters


def text_batch(batch: int, sequence: int) -> dict[str, torch.Tensor]:
    """A batch on the meta device: `input_ids` and `labels`, `[batch, sequence]`."""
    tokens = torch.empty(batch, sequence, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "labels": tokens}


def blocks_of_model(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def enable_checkpointing(model: Any, gpu: AsOnAGpu) -> None:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    options["context_fn"] = lambda: (nullcontext(), gpu)
    model.gradient_checkpointing_enable(options)


def _float_model(config: PretrainedConfig) -> Any:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # of any kind, from the model's class
        kind = type(config).__name__
        if "Unrecognized configuration class" in str(error):  # that message lists all known classes
            raise ValueError(
                f"transformers has no causal language model for a {kind}; only these can be estimated."
            ) from error
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # without PyTorch's stack
        raise ValueError(f"transformers cannot make a model of this {kind} ({reason}): mend the config.") from error


def _check(model: nn.Module, blocks: list[nn.Module], expected: int) -> None:
    kind = type(model).__name__
    if len(blocks) != expected:
        raise ValueError(
            f"{kind} has {len(blocks)} decoder blocks where its config says {expected}: it cannot be estimated."
        )
    for name, parameter in blocks[0].named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{kind} holds {name} as one tensor of {parameter.ndim} dimensions: experts, which GPTQ holds "
                "otherwise. Only models with linear layers can be estimated."
            )


def _linear_layers(model: nn.Module, blocks: list[nn.Module]) -> dict[str, Any]:
    inside = {id(module) for block in blocks for module in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in inside
    }


def _adapt(model: Any, layers: dict[str, Any], method: str, bits: int, group_size: int, rank: int) -> nn.Module:
    if method.startswith("qft"):
        config = QFTConfig()
        for layer in int8_modules(model, config).values():
            layer.weight = int8_weight(layer, config.outlier_ratio)
        return model.requires_grad_(True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(layers))
    lora._register_custom_module({NF4Linear: QLoraLinear})
    configs = {
        "peqa": PEQAConfig(task_type="CAUSAL_LM"),
        "lrec": LRECConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank),
        "lora": lora,
        "qlora": lora,
    }
    if method != "lora":
        for name, layer in layers.items():
            quantized = NF4Linear(layer) if method == "qlora" else PackedLinear(layer, name, bits, group_size)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized)
    return get_peft_model(model, configs[method])


def _adam_states(parameter: torch.Tensor, optimizer: str) -> list[torch.Tensor]:
    """The states of PyTorch's fused AdamW, or of bitsandbytes' 8-bit AdamW, which keeps small tensors in fp32."""
    count = parameter.numel()
    with torch.device("meta"):
        if optimizer == "adamw":
            return [torch.empty(count), torch.empty(count), torch.empty(())]
        if count < _SMALLEST_IN_8_BITS:
            return [torch.empty(count), torch.empty(count)]
        codes = [torch.empty(count, dtype=torch.uint8) for _ in range(2)]
        return [*codes, *(torch.empty(blocks_of(count)) for _ in range(2))]
