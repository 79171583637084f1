"""Estimates the memory of a training step from a model's config alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Hashable
from typing import Any

from transformers import PretrainedConfig

from ..model_config import read_model_config
from .count import AFTER_BACKWARD, KINDS, Amounts, total_bytes
from .report import MemoryReport, make_report, precisions
from .subject import METHODS, OPTIMIZERS, planned_subject, text_batch


_BITS, _GROUP_SIZE = 4, 128
_LARGEST_PERIOD = 6  # layers after which a pattern of layer types may repeat


def estimate_memory(
    config: PretrainedConfig | str | os.PathLike[str],
    method: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    rank: int = 16,
    batch: int = 1,
    sequence: int = 2048,
    checkpointing: bool = True,
    optimizer: str = "adamw",
) -> MemoryReport:
    """Estimate the memory of a training step on one GPU from a model's config.

    The model runs forward and backward on the meta device, and every tensor is counted while it is live, so any
    architecture of transformers works. The step is that of a `Trainer` with `bf16=True`: weights that are not
    quantized are bf16, adapters are fp32, and the model computes its own loss on all logits. Only two depths are run;
    the amounts at the full depth are extrapolated from them.

    The total is the peak of tensors, as in `torch.cuda.max_memory_allocated()`. The CUDA context, cuBLAS workspaces
    and memory that the allocator reserves but does not use come on top. `benchmarks/estimate.py` compares estimates
    with measured peaks.

    Args:
        config: a config, its `config.json`, a directory with one, or the Hub id of a model.
        method: what is trained, and the format of the weights.

            | | weights of the blocks | trained |
            |---|---|---|
            | `"peqa"` | GPTQ | the scales |
            | `"lrec"` | GPTQ | a low-rank adapter |
            | `"qft-stack"` | int8 with 1 % outliers | all parameters, gradients in int8 |
            | `"qft-fused"` | the same | all parameters, each updated within backward |
            | `"lora"` | bf16 | PEFT's LoRA |
            | `"qlora"` | NF4 with double quantization | PEFT's LoRA |

        bits: bits per GPTQ weight: 2, 3, 4 or 8. Default: from a GPTQ config, else 4.
        group_size: rows of a GPTQ weight that share a scale, -1 for all. Default: from a GPTQ config, else 128.
        rank: rank of LREC, LoRA and QLoRA, on all linear layers of the blocks.
        batch: sequences per forward pass.
        sequence: tokens per sequence.
        checkpointing: whether gradient checkpointing is on.
        optimizer: `"adamw"`, or `"adamw8bit"` from bitsandbytes. QFT has its own.

    Returns:
        A report with rows for weights, scales, the rest of the model, adapter, gradients and optimizer between
        backward and the optimizer step, and for activations, decoded weights and logits at the peak.

    Raises:
        ValueError: an unknown method or optimizer, a number out of range, or a model that cannot be counted: it is not
            a causal language model of transformers, or stores its experts in one tensor.
        InvalidFileError: the config is damaged, or transformers cannot use it.
        OSError: the config was not found.
    """
    estimate = Estimate(
        config,
        method,
        bits=bits,
        group_size=group_size,
        rank=rank,
        sequence=sequence,
        checkpointing=checkpointing,
        optimizer=optimizer,
    )
    return estimate.report(batch)


class Estimate:
    """[`estimate_memory`] for several batch sizes of one model and method, with the same arguments.

    Attributes:
        bits: bits per weight of the blocks.
        group_size: rows of a GPTQ weight that share a scale; None for other methods.
    """

    def __init__(
        self,
        config: PretrainedConfig | str | os.PathLike[str],
        method: str,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        rank: int = 16,
        sequence: int = 2048,
        checkpointing: bool = True,
        optimizer: str = "adamw",
    ) -> None:
        for name, value, known in (("method", method, METHODS), ("optimizer", optimizer, OPTIMIZERS)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(known)}.")
        for name, number in (("rank", rank), ("sequence", sequence)):
            _require_positive(name, number)
        model = _text_config(config)
        packed = _gptq_config(model)
        bits = packed.get("bits", _BITS) if bits is None else bits
        group_size = packed.get("group_size", _GROUP_SIZE) if group_size is None else group_size
        depth: Any = getattr(model, "num_hidden_layers", None)
        for name, number in (("bits", bits), ("group_size", group_size), ("num_hidden_layers", depth)):
            if not isinstance(number, int):
                raise ValueError(f"{name}={number!r}, which has to be an integer: mend the config.")
        _require_positive("num_hidden_layers", depth)
        self.bits = {"peqa": bits, "lrec": bits, "lora": 16, "qlora": 4}.get(method, 8)
        self.group_size = group_size if method in ("peqa", "lrec") else None
        self._method, self._optimizer, self._sequence = method, optimizer, sequence
        model.quantization_config = None
        period = _period(model)
        shallow = 4 * period + depth % period
        depths = (shallow, shallow + period) if shallow + period < depth else (depth,)
        self._further = (depth - depths[0]) // period
        self._kind = model.model_type
        options: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "rank": rank,
            "checkpointing": checkpointing,
            "optimizer": optimizer,
        }
        planned = [planned_subject(_of_depth(model, n), method, 2 * period, **options) for n in depths]
        self._subjects = [subject for subject, _ in planned]
        self._parameters = self._at_depth(*(parameters for _, parameters in planned))
        self._counted: dict[int, dict[Hashable, Amounts]] = {}

    def report(self, batch: int = 1) -> MemoryReport:
        """Estimate a step with a batch of this many sequences."""
        bits = self.bits if self.group_size is not None else None
        return make_report(self._count(batch), self._parameters, precisions(self._method, self._optimizer, bits))

    def peak(self, batch: int = 1) -> int:
        """The peak in bytes, which is the report's total."""
        return max(total_bytes(amounts) for event, amounts in self._count(batch).items() if event != AFTER_BACKWARD)

    def largest_batch(self, memory: int) -> int:
        """The largest batch whose peak is at most `memory` bytes; 0 if one sequence does not fit."""
        if self.peak(1) > memory:
            return 0
        # The peak is the maximum of several linear functions of the batch, so it is convex: between two batches it
        # lies on or below the line through them, beyond them on or above it.
        fits, most = 1, self._on_line(1, 2, memory)
        guess = most
        while fits < most:
            if self.peak(guess) <= memory:
                fits, most = guess, min(most, self._on_line(fits, guess, memory))
                guess = most
            else:
                most = guess - 1
                guess = max(self._on_line(fits, guess, memory), fits + 1)
        return fits

    def _on_line(self, low: int, high: int, memory: int) -> int:
        """The batch at which the line through the peaks of `low` and `high` reaches `memory` bytes."""
        step = (self.peak(high) - self.peak(low)) / (high - low)
        return low + int((memory - self.peak(low)) / step)

    def _count(self, batch: int) -> dict[Hashable, Amounts]:
        _require_positive("batch", batch)
        if batch not in self._counted:
            try:
                counted = [subject.train(text_batch(batch, self._sequence)) for subject in self._subjects]
            except (NotImplementedError, RuntimeError) as error:
                raise ValueError(f"The memory of a {self._kind} model cannot be counted: {error}.") from error
            self._counted[batch] = self._extrapolate(*counted)
        return self._counted[batch]

    def _extrapolate(self, *counted: dict[Hashable, Amounts]) -> dict[Hashable, Amounts]:
        """The amounts at the model's depth."""
        return {
            event: {
                kind: (
                    self._at_depth(*(amounts[event][kind][0] for amounts in counted)),
                    self._at_depth(*(amounts[event][kind][1] for amounts in counted)),
                )
                for kind in KINDS
            }
            for event in counted[0]
        }

    def _at_depth(self, shallow: int, deeper: int = 0) -> int:
        """Extrapolate a number linearly from the two counted depths to the model's depth."""
        return shallow + (deeper - shallow) * self._further if self._further else shallow


def _require_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name}={number}: use a positive number.")


def _text_config(config: PretrainedConfig | str | os.PathLike[str]) -> PretrainedConfig:
    """A copy of the text model's config, with the quantization config."""
    if not isinstance(config, PretrainedConfig):
        config = read_model_config(config)
    text = copy.deepcopy(config.get_text_config())
    if getattr(text, "quantization_config", None) is None:
        text.quantization_config = copy.deepcopy(getattr(config, "quantization_config", None))
    return text


def _gptq_config(config: Any) -> dict[str, Any]:
    found = config.quantization_config or {}
    found = found if isinstance(found, dict) else found.to_dict()
    return found if found.get("quant_method") == "gptq" else {}


def _layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    depth = config.num_hidden_layers
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == depth}


def _period(config: PretrainedConfig) -> int:
    """The number of layers after which layer types repeat; the depth if it exceeds `_LARGEST_PERIOD`."""
    lists, depth = list(_layer_lists(config).values()), config.num_hidden_layers
    for period in range(1, min(_LARGEST_PERIOD, depth - 1) + 1):
        if all(values[period:] == values[:-period] for values in lists):
            return period
    return depth


def _of_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    cut = copy.deepcopy(config)
    for name, value in _layer_lists(config).items():
        setattr(cut, name, value[:layers])
    cut.num_hidden_layers = layers
    return cut
