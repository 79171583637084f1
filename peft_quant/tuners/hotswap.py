"""Hot-swapping of adapters: new values in place of old ones, without new modules and without recompilation."""

from __future__ import annotations

from typing import Any

import peft.utils.hotswap
import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import infer_device
from peft.utils.save_and_load import load_peft_weights

from ..gptq.fingerprint import is_sampled
from ..module_names import SCALE_DELTAS
from .lrec.config import LRECConfig
from .peqa.config import PEQAConfig
from .peqa.layer import PEQALayer, check_finite


def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the values of a loaded adapter by those of another one, in place.

    PEFT's function of the same name extended to PEQA; other adapters, LREC's among them, are handed to PEFT's.

    Args:
        model: the model with the loaded adapter; may be compiled.
        model_name_or_path: directory or Hub id of the new adapter.
        adapter_name: name of the adapter to overwrite; it stays.
        torch_device: device to load the new weights on.
        **kwargs: Hub options such as `revision`, `subfolder` and `token`.

    Raises:
        ValueError: there is no such adapter or it is merged; the adapters differ in base model, targets or options;
            the new one holds NaN. The model is left as it was.
    """
    new = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    if isinstance(new, (LRECConfig, PEQAConfig)) and new.modules_to_save:
        raise ValueError(
            f"{model_name_or_path} trained modules_to_save={sorted(new.modules_to_save)}, which hot-swapping does not "
            "replace. Load it with `load_adapter` instead."
        )
    if isinstance(new, LRECConfig) and (new.rank_pattern or new.alpha_pattern):
        raise ValueError(
            f"{model_name_or_path} has rank_pattern={new.rank_pattern} and alpha_pattern={new.alpha_pattern}, which "
            "PEFT's hot-swapping does not apply to the scaling of single layers. Load it with `load_adapter` instead."
        )
    if isinstance(new, LRECConfig) and new.bias != "none":
        raise ValueError(
            f"{model_name_or_path} trained biases (bias={new.bias!r}), which hot-swapping does not replace. Load "
            "it with `load_adapter` instead."
        )
    if isinstance(new, LRECConfig) and new.base_fingerprint is not None and is_sampled(new.base_fingerprint):
        raise ValueError(
            f"{model_name_or_path} was saved by an older version of peft_quant, whose record of the base cannot be "
            "compared in hot-swapping. Load it with `load_adapter`, and save it again."
        )
    if not isinstance(new, PEQAConfig):
        peft.utils.hotswap.hotswap_adapter(model, model_name_or_path, adapter_name, torch_device, **kwargs)
        return
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r} to replace; loaded are {sorted(model.peft_config)}.")
    old = model.peft_config[adapter_name]
    for option in ("peft_type", "serving_dtype"):
        if getattr(old, option, None) != getattr(new, option):
            raise ValueError(
                f"{model_name_or_path} cannot replace adapter {adapter_name!r}: {option} is {getattr(new, option)!r}, "
                f"the loaded adapter has {getattr(old, option, None)!r}."
            )
    if new.base_quantization is None:
        raise ValueError(
            f"{model_name_or_path} cannot replace adapter {adapter_name!r}: it does not record the base it was "
            "trained on. Load it with `load_adapter` instead."
        )
    layers = {
        name.removeprefix("_orig_mod."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, PEQALayer) and adapter_name in layer.peqa_scales
    }
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged: call `unmerge_adapter` before replacing it.")
    weights = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    expected = {f"{name}.{SCALE_DELTAS}" for name in layers}
    if weights.keys() != expected:
        difference = sorted(weights.keys() ^ expected)
        raise ValueError(
            f"{model_name_or_path} cannot replace adapter {adapter_name!r}: they differ in {len(difference)} tensors, "
            f"first {difference[0]}. Load it with `load_adapter` instead."
        )
    for key, weight in weights.items():
        check_finite(f"{model_name_or_path}: {key}", weight)
    model.base_model.require_base(adapter_name, new.base_quantization, new.base_model_name_or_path)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.peqa_scales[adapter_name].copy_(weights[f"{name}.{SCALE_DELTAS}"])
