"""The bytes of a run of QFT, counted from the model and the options."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..estimate.report import MemoryReport, MemoryRow
from ..qft.weight import Int8Weight


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def memory_report(
    model: nn.Module,
    *,
    fused: bool = False,
    state_bits: int = 8,
    error_feedback: bool = False,
    batch: tuple[int, int] | None = None,
    checkpointing: bool = False,
) -> MemoryReport:
    """What training a model takes: each state as its tensors will be, and an estimate of what a step adds.

    Args:
        model: a model that [`quantize_model`] made or that was loaded from an int8 checkpoint.
        fused: whether the update happens within backward, so that no gradient is kept.
        state_bits: 8, or 32 for momentum in float.
        error_feedback: whether rounding errors are kept beside the weights.
        batch: sequences and tokens of each, in one forward pass; None if that is not known, and activations and logits
            are left out.
        checkpointing: whether gradient checkpointing is on. Without it, the activations are not estimated.
    """
    parameters = list({id(p): p for p in model.parameters()}.values())
    weights = [p for p in parameters if isinstance(p, Int8Weight)]
    floats = [p for p in parameters if not isinstance(p, Int8Weight)]
    trained = [p for p in parameters if p.requires_grad]
    rows = [
        MemoryRow(
            "weights",
            "int8, fp32 scales",
            _count(weights),
            sum(_size(w.codes) + _size(w.scales) for w in weights),
            True,
        ),
        MemoryRow(
            "outliers",
            "fp32, with columns",
            sum(w.outlier_values.numel() for w in weights if w.outlier_values is not None),
            sum(_size(part) for w in weights for name, part in w.parts.items() if name.startswith("outlier")),
            True,
        ),
    ]
    for dtype in dict.fromkeys(p.dtype for p in floats):
        of_dtype = [p for p in floats if p.dtype == dtype]
        rows.append(
            MemoryRow(
                "float parameters", _NAMES.get(dtype, str(dtype)), _count(of_dtype), sum(map(_size, of_dtype)), True
            )
        )
    if not fused:
        rows.append(_blocks("gradients", trained, 8))
    rows.append(_blocks("momentum", trained, state_bits))
    if error_feedback:
        of_weights = [p for p in weights if p.requires_grad]
        rows.append(MemoryRow("rounding errors", "int8", _count(of_weights), _count(of_weights), True))
    rows += _of_a_step(model, trained, batch, checkpointing)
    return MemoryReport([row for row in rows if row.bytes], _count(parameters))


def planned_memory(model: nn.Module, args: Any, dataset: Any) -> MemoryReport:
    """What a run takes by its [`QFTArguments`], with batches as the first sample of the training data shows them."""
    return memory_report(
        model,
        fused=args.fused,
        state_bits=args.state_bits,
        error_feedback=args.rounding == "error_feedback",
        batch=_batch(dataset, args.per_device_train_batch_size),
        checkpointing=args.gradient_checkpointing,
    )


def _batch(dataset: Any, size: int) -> tuple[int, int] | None:
    """Sequences and tokens of each in a forward pass, as far as the first sample shows them."""
    if not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    sample = dataset[0]
    return (size, len(sample["input_ids"])) if "input_ids" in sample else None


def _of_a_step(
    model: Any, trained: list[nn.Parameter], batch: tuple[int, int] | None, checkpointing: bool
) -> list[MemoryRow]:
    largest = max(trained, key=lambda p: p.numel() * p.element_size(), default=None)
    rows = []
    if largest is not None:
        name = _NAMES.get(largest.dtype, str(largest.dtype))
        size = largest.numel() * largest.element_size()
        rows.append(MemoryRow("workspace", f"{name}, a weight and its gradient", 2 * largest.numel(), 2 * size, False))
    config = getattr(model, "config", None)
    if batch is None or config is None:
        return rows
    text = config.get_text_config()
    tokens, dtype = batch[0] * batch[1], trained[0].dtype if trained else torch.float32
    size = torch.empty(0, dtype=dtype).element_size()
    if checkpointing:
        kept = tokens * text.hidden_size * text.num_hidden_layers
        rows.append(MemoryRow("checkpointed activations", _NAMES.get(dtype, str(dtype)), kept, kept * size, False))
    logits = tokens * text.vocab_size
    # as the model gives them, their fp32 copy, and the gradients of both
    rows.append(MemoryRow("logits", "with fp32 copy and gradients", logits, logits * 2 * (size + 4), False))
    return rows


def _blocks(what: str, parameters: list[nn.Parameter], bits: int) -> MemoryRow:
    values = _count(parameters)
    if bits == 32:
        return MemoryRow(what, "fp32", values, 4 * values, True)
    scales = sum(ops.blocks_of(p.numel()) for p in parameters)
    return MemoryRow(what, "int8, fp32 scale a block", values, values + 4 * scales, True)


def _count(tensors: list[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
