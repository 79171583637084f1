"""Facts in a training report about the model, the training and the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from ... import gptq
from ...estimate.report import MemoryRow, dtype_name
from ...export.card import public_name
from ...first_step import sample
from ...inspection import layer_changes
from ...optimizer_steps import skipped_steps
from ...qft.weight import Int8Weight
from ...tuners.layer import AdaptedLinear
from .page import Changes, format_bytes


_SECRET = re.compile(r"(?i)token|secret|password|api.?key")
_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def losses(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The loss of each evaluation set by metric prefix; for DistillationTrainer, the cross entropy."""
    found = {}
    for key in metrics:
        prefix = key.removesuffix("_runtime")
        loss = metrics.get(f"{prefix}_ce", metrics.get(f"{prefix}_loss"))
        if key.endswith("_runtime") and prefix != "train" and loss is not None:
            found[prefix] = float(loss)
    return found


def status(state: TrainerState, training: bool) -> str:
    if state.global_step >= state.max_steps:
        return f"finished, {state.global_step:,} steps"
    return f"{'in training' if training else 'stopped'}, step {state.global_step:,} of {state.max_steps:,}"


def method(model: Any) -> str:
    config = _active_adapter(model)[0]
    if config is not None:
        return getattr(config.peft_type, "value", config.peft_type)
    return "QFT" if any(isinstance(p, Int8Weight) for p in model.parameters()) else "Full fine-tuning"


def model_name(model: Any) -> str | None:
    return public_name(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def summary(args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    values = sum(p.numel() for p in trained)
    size = sum(_size(p) for p in trained)
    last = {key: value for entry in state.log_history for key, value in entry.items()}
    tokens = int(state.num_input_tokens_seen or last.get("num_tokens") or 0)  # TRL counts tokens itself
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts = {
        "Method": method(model),
        "Model": model_name(model),
        "Base format": _base_format(model),
        "Trained": f"{values:,} values, {_precisions(trained)}, {format_bytes(size)}",
        "Steps": f"{state.global_step:,} of {state.max_steps:,}, epoch {state.epoch or 0:.3g}",
        "Sequences a step": batch,
        "Tokens": f"{tokens:,}" if tokens else None,
        "Learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "Seed": str(args.seed),
        "Skipped steps": last.get("skipped_steps") or skipped_steps(model),
        "Device": torch.cuda.get_device_name() if torch.cuda.is_available() and args.device.type == "cuda" else "CPU",
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def _base_format(model: Any) -> str | None:
    """Format of the base's weights according to its configuration; None if unknown."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    known = getattr(_active_adapter(model)[0], "base_quantization", None)
    known = known or (config if isinstance(config, dict) else config.to_dict() if config is not None else {})
    if not known.get("bits"):
        return known.get("quant_method") or (dtype_name(model.dtype) if hasattr(model, "dtype") else None)
    words = [f"GPTQ, {known['bits']} bits"]
    if known.get("group_size"):
        words.append("one group a column" if known["group_size"] == -1 else f"groups of {known['group_size']}")
    words.append("symmetric" if known.get("sym") else "asymmetric")
    words += ["act-order"] * bool(known.get("desc_act"))
    return ", ".join(words)


def model_rows(model: nn.Module) -> list[MemoryRow]:
    """The model's tensors, each counted once: packed weights, trained parameters and the rest."""
    layers = [gptq.packed_tensors(module) for module in model.modules() if gptq.is_packed(module)]
    packed = {id(tensor) for layer in layers for tensor in layer}
    bits = sorted({32 * layer.qweight.shape[0] // layer.g_idx.numel() for layer in layers})
    values = sum(layer.g_idx.numel() * layer.qweight.shape[1] for layer in layers)
    size = sum(_size(tensor) for layer in layers for tensor in layer)
    parameters = [p for p in model.parameters() if id(p) not in packed]
    return [
        MemoryRow("packed weights", f"{' and '.join(map(str, bits))} bits, fp16 scales", values, size, True),
        memory_row("frozen weights", [p for p in parameters if not p.requires_grad]),
        memory_row("trained weights", [p for p in parameters if p.requires_grad]),
        memory_row("buffers", [b for b in model.buffers() if id(b) not in packed]),
    ]


def memory_row(what: str, tensors: Sequence[torch.Tensor]) -> MemoryRow:
    return MemoryRow(what, _precisions(tensors), sum(t.numel() for t in tensors), sum(map(_size, tensors)), True)


def _precisions(tensors: Sequence[torch.Tensor]) -> str:
    names = ["int8" if isinstance(tensor, Int8Weight) else dtype_name(tensor.dtype) for tensor in tensors]
    return " and ".join(dict.fromkeys(names))


def _size(tensor: torch.Tensor) -> int:
    return tensor.bytes_held if isinstance(tensor, Int8Weight) else tensor.numel() * tensor.element_size()


def int8_changes(model: Any, codes: Mapping[str, torch.Tensor]) -> Changes:
    """Share of the codes sampled before training that changed, by the name of the layer.

    Args:
        model: the model.
        codes: codes sampled before training, by the name of the weight.
    """
    weights = dict(model.named_parameters())
    shares = {
        name.removesuffix(".weight"): float((sample(weights[name].codes) != before).float().mean())
        for name, before in codes.items()
    }
    return Changes("Share of the int8 codes that changed, of some thousand of each weight", shares)


def adapter_changes(model: Any) -> Changes | None:
    config, adapter = _active_adapter(model)
    if config is None or not any(isinstance(module, AdaptedLinear) for module in model.modules()):
        return None
    inner = model.base_model.model if isinstance(model, PeftModel) else model

    def base(name: str) -> Any:
        layer = inner.get_submodule(name)
        return layer.base_tensors(), layer.packed

    rows = layer_changes(get_peft_model_state_dict(model, adapter_name=adapter), config, base)
    shares = {row.name: row.relative for row in rows if row.relative is not None}
    return Changes(
        "Change of the scales: root mean square of delta / scale"
        if config.peft_type == "PEQA"
        else "Size of the adapter: norm of its product / norm of the weight",
        {name: shares[name] for name, _ in inner.named_modules() if name in shares},
    )


def _active_adapter(model: Any) -> tuple[Any, str | None]:
    """Configuration and name of the active adapter; None for both without one."""
    if not getattr(model, "peft_config", None):
        return None, None
    names = model.active_adapters  # a method in transformers' models, a property in PEFT's
    name = (names() if callable(names) else names)[0]
    return model.peft_config[name], name


def peak() -> tuple[str, int] | None:
    """Peak memory so far, as a label and bytes: PyTorch's on GPUs, otherwise of the whole process."""
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        return "CUDA memory allocated", sum(torch.cuda.max_memory_allocated(device) for device in devices)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return "the whole process", getrusage(RUSAGE_SELF).ru_maxrss * unit


def command() -> list[str]:
    """The command line without directories and secrets; empty in notebooks and interactive sessions."""
    script, *words = sys.argv or [""]
    if script in ("", "-c") or Path(script).name in _NOTEBOOKS:
        return []
    shown, hide = ["python", Path(script).name], False
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        is_secret = bool(_SECRET.search(option))
        if hide or word.startswith("hf_") or (is_secret and equals):
            value = "***"
        hide = is_secret and not equals
        shown.append(f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}")
    return shown
