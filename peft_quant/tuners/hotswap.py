"""Hot-swapping: replaces the values of a loaded adapter without new modules or recompilation."""

from __future__ import annotations

from typing import Any

import peft.utils.hotswap
import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import infer_device

from ..gptq.fingerprint import is_sampled
from ..module_names import SCALE_DELTAS
from .layer import check_finite
from .lrec.config import LRECConfig
from .peqa.config import PEQAConfig
from .peqa.layer import PEQALayer
from .saved import load_config, load_weights
from .switching import hotswapping


def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the values of a loaded adapter with those of another one, in place.

    Extends PEFT's function of the same name to PEQA; LREC and other adapters are passed on to PEFT's. Forwards of
    other threads have all the old values or all the new ones.

    Args:
        model: the model with the loaded adapter; it may be compiled.
        model_name_or_path: directory or Hub id of the new adapter.
        adapter_name: name of the loaded adapter, which stays.
        torch_device: device to load the new weights on.
        **kwargs: Hub options such as `revision`, `subfolder` and `token`.

    Raises:
        InvalidFileError: a file of the new adapter is damaged.
        RuntimeError: PEFT found other tensors in an LREC adapter than in the loaded one.
        ValueError: there is no such adapter or it is merged; the adapters differ in base model, targets or options; or
            the new one holds NaN. The model is then unchanged.
    """
    new = load_config(model_name_or_path, **kwargs)
    _require_replaceable(new, model_name_or_path)
    device = torch_device or infer_device()
    weights = load_weights(model_name_or_path, device, **kwargs) if isinstance(new, (LRECConfig, PEQAConfig)) else {}
    if isinstance(new, PEQAConfig):
        _hotswap_peqa(model, new, weights, model_name_or_path, adapter_name)
    else:
        _check_values(model_name_or_path, weights)
        peft.utils.hotswap.hotswap_adapter(model, model_name_or_path, adapter_name, torch_device, **kwargs)


def _check_values(path: str, weights: dict[str, torch.Tensor]) -> None:
    for key, weight in weights.items():
        check_finite(f"{path}: {key}", weight)


def _require_replaceable(new: PeftConfig, path: str) -> None:
    """Raise a `ValueError` if hot-swapping would not replace everything that an adapter trained."""
    if isinstance(new, (LRECConfig, PEQAConfig)) and new.modules_to_save:
        raise ValueError(
            f"{path} trained modules_to_save={sorted(new.modules_to_save)}, which hot-swapping does not replace. Load "
            "it with `load_adapter` instead."
        )
    if not isinstance(new, LRECConfig):
        return
    if new.rank_pattern or new.alpha_pattern:
        raise ValueError(
            f"{path} has rank_pattern={new.rank_pattern} and alpha_pattern={new.alpha_pattern}, which PEFT's "
            "hot-swapping does not apply to the scaling of single layers. Load it with `load_adapter` instead."
        )
    if new.bias != "none":
        raise ValueError(
            f"{path} trained biases (bias={new.bias!r}), which hot-swapping does not replace. Load it with "
            "`load_adapter` instead."
        )
    if new.base_fingerprint is not None and is_sampled(new.base_fingerprint):
        raise ValueError(
            f"{path} was saved by an older version of peft_quant, whose record of the base cannot be compared in "
            "hot-swapping. Load it with `load_adapter`, and save it again."
        )


def _hotswap_peqa(
    model: PeftModel, new: PEQAConfig, weights: dict[str, torch.Tensor], path: str, adapter_name: str
) -> None:
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r} to replace; loaded are {sorted(model.peft_config)}.")
    cannot_replace = f"{path} cannot replace adapter {adapter_name!r}"
    old = model.peft_config[adapter_name]
    for option in ("peft_type", "serving_dtype"):
        if getattr(old, option, None) != getattr(new, option):
            raise ValueError(
                f"{cannot_replace}: {option} is {getattr(new, option)!r}, the loaded adapter has "
                f"{getattr(old, option, None)!r}."
            )
    if new.base_quantization is None:
        raise ValueError(
            f"{cannot_replace}: it does not record the base it was trained on. Load it with `load_adapter` instead."
        )
    layers = {
        name.removeprefix("_orig_mod."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, PEQALayer) and adapter_name in layer.peqa_scales
    }
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged: call `unmerge_adapter` before replacing it.")
    deltas = {f"{name}.{SCALE_DELTAS}": layer.peqa_scales[adapter_name] for name, layer in layers.items()}
    if weights.keys() != deltas.keys():
        difference = sorted(weights.keys() ^ deltas.keys())
        raise ValueError(
            f"{cannot_replace}: they differ in {len(difference)} tensors, first {difference[0]}. Load it with "
            "`load_adapter` instead."
        )
    _check_values(path, weights)
    model.base_model.require_base(adapter_name, new.base_quantization, new.base_model_name_or_path)
    with hotswapping(model), torch.no_grad():
        for key, delta in deltas.items():
            delta.copy_(weights[key])
