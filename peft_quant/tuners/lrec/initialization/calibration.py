"""Covariances of the inputs of adapted layers, one block of the model at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ....module_names import Block, split_block
from ..layer import LRECLinear


_HELD_OUT_EVERY = 4


class Covariances(NamedTuple):
    """Covariances of one layer's inputs: `mean(x x^T)`, fp32 `[K, K]`."""

    fit: torch.Tensor
    """over three of every four sequences"""
    held_out: torch.Tensor
    """over the remaining sequences, which are held out"""


@dataclass
class _BatchPart:
    """The held-out sequences of a batch, or the remaining ones.

    Attributes:
        inputs: arguments of the model.
        held_out: whether these are the held-out sequences.
        outputs: outputs of the last block that was run, by the name of its list of blocks.
    """

    inputs: dict[str, Any]
    held_out: bool
    outputs: dict[str, Any] = field(default_factory=dict)


class _StopForwardError(Exception):
    """Ends a forward pass early."""


def split(calibration: Iterable[Mapping[str, Any] | torch.Tensor]) -> list[_BatchPart]:
    """Split calibration batches into sequences to fit and sequences to hold out, every fourth one.

    Args:
        calibration: batches, each a dict of the model's arguments or `input_ids`, int64 `[sequences, tokens]`.

    Raises:
        ValueError: a batch is neither, or there are fewer than two sequences.
    """
    parts = []
    sequences = 0
    for batch in calibration:
        if isinstance(batch, torch.Tensor):
            batch = {"input_ids": batch}
        tensors = [value for value in batch.values() if torch.is_tensor(value)] if isinstance(batch, Mapping) else []
        if not tensors or tensors[0].ndim < 2:
            raise ValueError(
                f"`calibration` holds a {type(batch).__name__} that is not a batch: give dicts of tensors or tensors "
                "of `input_ids`, of shape [sequences, tokens]."
            )
        size = len(tensors[0])
        held_out = torch.arange(sequences, sequences + size) % _HELD_OUT_EVERY == 1
        sequences += size
        for rows, is_held_out in ((~held_out, False), (held_out, True)):
            if rows.any():
                inputs = {name: value[rows] if _is_batched(value, size) else value for name, value in batch.items()}
                parts.append(_BatchPart(inputs, is_held_out))
    if sequences < 2:
        raise ValueError(
            f"`calibration` has {sequences} sequences. Give at least two, of which one is held out; a hundred "
            "or more of the model's full length are usual."
        )
    return parts


def _is_batched(value: Any, size: int) -> bool:
    return torch.is_tensor(value) and value.ndim > 0 and len(value) == size


def covariances(
    model: nn.Module, layers: dict[str, LRECLinear], calibration: Iterable[Mapping[str, Any] | torch.Tensor]
) -> Iterator[tuple[list[str], dict[str, Covariances]]]:
    """Covariances of the layers' inputs in the model without adapters, one block at a time.

    For each block, the model's forward runs up to the end of that block. Earlier blocks are skipped, the last of them
    returning its saved output for these sequences, so that all blocks together cost about one pass. Models whose
    blocks need more than the previous block's output (tested on the first sequences) are run from the beginning for
    every block.

    Memory: the covariances of one block, shared by layers with the same input, and the hidden states of all
    calibration tokens between two blocks.

    Args:
        model: the model that contains the layers.
        layers: the layers, by name.
        calibration: see [`split`].

    Yields:
        The names of a block's layers, and the covariances of those that received any token. Layers outside the blocks
        come last.
    """
    parts = split(calibration)
    blocks: dict[Block, list[str]] = {}
    outside: list[str] = []
    for name in layers:
        block = split_block(name)[0]
        (outside if block is None else blocks.setdefault(block, [])).append(name)
    chained = _is_chain(model, list(blocks), parts[0])
    done: dict[str, int] = {}
    for block, names in blocks.items():
        sums = _Sums({name: layers[name] for name in names})
        for part in parts:
            output = _run(model, part, done, block, sums)
            if chained:
                part.outputs[block.blocks] = output
        if chained:
            done[block.blocks] = block.position
        yield names, sums.covariances()
    if outside:
        sums = _Sums({name: layers[name] for name in outside})
        for part in parts:
            _run(model, part, done, None, sums)
        yield outside, sums.covariances()


_Key = tuple[tuple[str, ...], bool]  # layers with the same input, and whether it is held out


class _Sums:
    """Sums of `x x^T` over the layers' inputs, shared by layers that always receive the same tensor."""

    def __init__(self, layers: dict[str, LRECLinear]) -> None:
        self.layers = layers
        self.sums: dict[_Key, torch.Tensor] = {}
        self.tokens: dict[_Key, int] = {}
        self.inputs: list[tuple[torch.Tensor, list[str]]] = []

    def hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for x, names in self.inputs:
                if x is args[0]:
                    names.append(name)
                    return
            self.inputs.append((args[0], [name]))

        return record

    def add(self, mask: torch.Tensor | None, held_out: bool) -> None:
        """Add the recorded inputs, leaving out padding."""
        for x, names in self.inputs:
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x[mask.to(x.device, torch.bool)]
            x = x.reshape(-1, x.shape[-1]).float()
            key = tuple(names), held_out
            if key not in self.sums:
                self.sums[key] = x.new_zeros(x.shape[1], x.shape[1])
            self.sums[key].addmm_(x.t(), x)
            self.tokens[key] = self.tokens.get(key, 0) + len(x)
        self.inputs.clear()

    def covariances(self) -> dict[str, Covariances]:
        means: dict[tuple[_Key, ...], torch.Tensor] = {}
        of_layer = {}
        for name in self.layers:
            fit, held_out = (
                tuple(key for key in self.sums if name in key[0] and key[1] is held and self.tokens[key])
                for held in (False, True)
            )
            if not fit or not held_out:
                continue
            for keys in (fit, held_out):
                if keys not in means:
                    total = self.sums[keys[0]]
                    for key in keys[1:]:
                        total = total + self.sums[key]
                    means[keys] = total / sum(self.tokens[key] for key in keys)
                if not torch.isfinite(means[keys]).all():
                    raise ValueError(
                        f"The input of {name} is NaN or infinite on calibration data. Run the model in float32 or "
                        "bfloat16."
                    )
            of_layer[name] = Covariances(means[fit], means[held_out])
        self.sums.clear()
        return of_layer


@torch.no_grad()
def _run(
    model: nn.Module, part: _BatchPart, done: dict[str, int], block: Block | None, sums: _Sums | None = None
) -> Any:
    """Run a model to the end of a block and return the block's output; without a block, run the whole model.

    Args:
        done: index of the last block to skip, by list of blocks.
    """
    output = None

    def stop(module: nn.Module, args: Any, result: Any) -> None:
        nonlocal output
        output = result
        raise _StopForwardError

    device = next(model.parameters()).device
    inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in part.inputs.items()}
    with ExitStack() as stack:
        stack.enter_context(_as_quantized(model))
        for name, last in done.items():
            members = model.get_submodule(name)
            for index in range(last + 1):
                stack.enter_context(_skipped(members.get_submodule(str(index)), part.outputs[name]))
        handles = []
        if block is not None:
            handles.append(model.get_submodule(str(block)).register_forward_hook(stop))
        if sums is not None:
            handles += [layer.register_forward_pre_hook(sums.hook(name)) for name, layer in sums.layers.items()]
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(suppress(_StopForwardError))
        model(**inputs)
    if sums is not None:
        mask = part.inputs.get("attention_mask")
        sums.add(mask, part.held_out)
    return output


def _is_chain(model: nn.Module, blocks: list[Block], part: _BatchPart) -> bool:
    """Whether each block, given only the previous block's output, returns the same output on some sequences."""
    sizes: dict[Block, float] = {}
    with ExitStack() as stack:
        for block in blocks:

            def record(module: nn.Module, args: Any, result: Any, block: Block = block) -> None:
                sizes[block] = _size(result)

            stack.callback(model.get_submodule(str(block)).register_forward_hook(record).remove)
        _run(model, part, {}, None)
    trial = _BatchPart(part.inputs, part.held_out)
    done: dict[str, int] = {}
    for block in blocks:
        output = _run(model, trial, done, block)
        if not math.isclose(_size(output), sizes.get(block, 0.0), rel_tol=1e-3):
            return False
        trial.outputs[block.blocks] = output
        done[block.blocks] = block.position
    return True


def _size(output: Any) -> float:
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    return 0.0 if hidden is None else float(hidden.double().abs().sum())


@contextmanager
def _as_quantized(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, with LREC's adapters disabled."""
    training = [module for module in model.modules() if module.training]
    adapted: list[Any] = [layer for layer in model.modules() if isinstance(layer, LRECLinear)]
    enabled = [layer for layer in adapted if not layer.disable_adapters]
    model.eval()
    for layer in enabled:
        layer._disable_adapters = True  # `enable_adapters` would also change `requires_grad`
    try:
        yield
    finally:
        for layer in enabled:
            layer._disable_adapters = False
        for module in training:
            module.training = True


@contextmanager
def _skipped(block: nn.Module, output: Any) -> Iterator[None]:
    """Make a block return the given output without running."""
    replaced = block.__dict__.get("forward")  # set by accelerate's hooks
    block.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if replaced is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = replaced
