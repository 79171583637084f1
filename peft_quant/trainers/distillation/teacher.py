"""The float model as a teacher, in memory or offloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from ... import gptq
from .loss import TopK


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's output for one batch.

    Attributes:
        distribution: logits of the batch's shape, or a `TopK` with a row for each position of the batch.
        hidden: the last hidden state `[..., hidden_size]`, if requested.
    """

    distribution: torch.Tensor | TopK
    hidden: torch.Tensor | None

    def has_nan(self) -> bool:
        """Whether a probability is undefined: its logit is NaN or `inf`. It is zero where the logit is `-inf`."""
        scores = self.distribution.log_probs if isinstance(self.distribution, TopK) else self.distribution
        return not bool((scores < torch.inf).all())


class ModelTeacher:
    """A frozen float model. Weights that accelerate offloads are streamed.

    Raises:
        TypeError: the model is not a [`~transformers.PreTrainedModel`].
        ValueError: the model is quantized.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"The teacher is a {type(model).__name__}: give the float PreTrainedModel that was quantized, or the "
                "directory of a cache made by `cache_teacher`."
            )
        if any(gptq.is_packed(module) for module in model.modules()):
            raise ValueError(
                f"The teacher {model.config._name_or_path!r} is GPTQ-quantized itself: load the float model."
            )
        self.model = model.eval().requires_grad_(False)
        self.is_placed = any(hasattr(module, "_hf_hook") for module in model.modules())  # placed by accelerate

    def __str__(self) -> str:
        nbytes: dict[str, int] = {}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            nbytes[tensor.device.type] = nbytes.get(tensor.device.type, 0) + tensor.nbytes
        streamed = nbytes.pop("meta", 0)
        parts = [f"{size / 1e6:.1f} MB on {device}" for device, size in nbytes.items()]
        if streamed:
            largest = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in self.model.modules())
            parts.append(f"{streamed / 1e6:.1f} MB offloaded and streamed, {largest / 1e6:.1f} MB at a time")
        return f"teacher {self.model.config._name_or_path or type(self.model).__name__}: {', '.join(parts)}"

    def to(self, device: torch.device) -> None:
        """Move the model, unless accelerate has placed it."""
        if not self.is_placed:
            self.model.to(device)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, torch.Tensor], hidden: bool = False) -> TeacherOutput:
        with last_hidden_state(self.model, hidden) as states:
            logits = self.model(**inputs, use_cache=False).logits
        return TeacherOutput(logits, states[0] if hidden else None)

    def fingerprint(self) -> str:
        """Digest of a sample of the weights, independent of the device."""
        digest = hashlib.sha256()
        for name, module in self.model.named_modules():
            with align_module_device(module):
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    flat = parameter.detach().reshape(-1)
                    sample = flat[:: max(1, flat.numel() // 64)].float().cpu().contiguous()
                    digest.update(f"{name}.{parameter_name}{list(parameter.shape)}".encode())
                    digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Digest of a tokenizer's vocabulary."""
    if tokenizer is None:
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]


@contextmanager
def last_hidden_state(model: Any, wanted: bool = True) -> Iterator[list[torch.Tensor]]:
    """Collect the input of a language model's head, one tensor per forward pass."""
    states: list[torch.Tensor] = []
    if not wanted:
        yield states
        return
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        yield states
    finally:
        handle.remove()
