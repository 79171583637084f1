"""What a saved adapter may hold: finite values, of nothing but what it trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


KEY_PREFIX = "base_model.model."
SCALES = ".peqa_scales"

_ADAPTERS = {"PEQA": (SCALES,), "LREC": (".lora_A.weight", ".lora_B.weight")}
_TOKENS = ".trainable_tokens_delta"


def require_trained(
    adapter: str, config: Any, weights: Mapping[str, torch.Tensor], base: Callable[[str], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """Check that the tensors of a saved adapter are finite and are what its configuration trains.

    PEFT saves embeddings with an adapter that does not train them where it is asked to, and where the vocabulary was
    resized. They must be the base's.

    Args:
        adapter: what to call it in an error.
        config: its configuration.
        weights: its tensors, by name.
        base: gives the tensor of the base of a name, with the base's own number of rows; None if it has none.

    Returns:
        The tensors that differ from the base's, by their names in the base model.

    Raises:
        ValueError: naming the tensor.
    """
    trained: dict[str, torch.Tensor] = {}
    whole = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in weights.items()}
    keeps_ties = getattr(config, "ensure_weight_tying", False)
    for name, tensor in whole.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise ValueError(
                f"{adapter}: {name} holds {bad} NaN or infinite values among {tensor.numel()}, so it is damaged or "
                "its training diverged. Use an earlier checkpoint, or train again with a lower learning rate."
            )
        is_ours = is_trained(name, config) or (
            keeps_ties and any(is_trained(other, config) and torch.equal(tensor, whole[other]) for other in whole)
        )
        of_base = None if is_ours else base(name)
        if not is_ours and not _is_of_base(tensor, of_base):
            raise ValueError(
                f"{adapter} holds {name}, which its configuration does not train and which is not the base's: it "
                f"would overwrite that. Trained are its layers and modules_to_save={_modules(config)}. If it was "
                "trained, name its module there, in adapter_config.json; else save or download the adapter again."
            )
        if of_base is None or of_base.shape != tensor.shape:
            trained[name] = tensor
    return trained


def is_trained(name: str, config: Any) -> bool:
    """Whether a tensor of a saved adapter, by its name without a prefix, is one that its configuration trains."""
    method = config.peft_type.value
    if name.endswith(_ADAPTERS.get(method, ())) or any(f".{module}." in f".{name}" for module in _modules(config)):
        return True
    if getattr(config, "trainable_token_indices", None) is not None and name.endswith(_TOKENS):
        return True
    return getattr(config, "bias", "none") != "none" and name.endswith(".bias")


def _modules(config: Any) -> list[str]:
    return sorted(config.modules_to_save or [])


def _is_of_base(tensor: torch.Tensor, base: torch.Tensor | None) -> bool:
    if base is None or base.shape[1:] != tensor.shape[1:] or tensor.ndim != 2:
        return False
    rows = min(len(base), len(tensor))
    ours, theirs = tensor[:rows].cpu(), base[:rows].detach().cpu()
    return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
