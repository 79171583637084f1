"""Saves of adapters and int8 models that are whole, although PEFT and transformers write one file after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import replaced_files
from ..qft.quantizer import QFTQuantizer
from ..registry import wrap_method
from ..tuners.layer import AdaptedLinear


replaced_adapter = partial(replaced_files, key=CONFIG_NAME, stale=(SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
"""[`replaced_files`] of an adapter's directory."""

replaced_checkpoint = partial(
    replaced_files,
    key="config.json",
    stale=(SAFE_WEIGHTS_NAME, "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME),
)
"""[`replaced_files`] of a checkpoint's directory."""


def save_whole(stock: Callable[..., Any], replaced: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a `save_pretrained` of PEFT or transformers with a directory whose files then replace the old ones.

    Args:
        stock: the original method.
        replaced: [`replaced_adapter`] or [`replaced_checkpoint`].
        *args: its arguments, the model first.
        **kwargs: its named arguments.
    """
    call = signature(stock).bind(*args, **kwargs)
    if not call.arguments.get("is_main_process", True):  # takes part in collecting the tensors, and writes nothing
        return stock(*args, **kwargs)
    with replaced(call.arguments["save_directory"]) as directory:
        call.arguments["save_directory"] = os.fspath(directory)
        return stock(*call.args, **call.kwargs)


def _save_model(stock: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
    options = signature(stock).bind(model, *args, **kwargs).arguments
    if options.get("push_to_hub") or options.get("distributed_checkpoint"):  # upload, or share, the directory itself
        return stock(model, *args, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False):
        if any(isinstance(module, AdaptedLinear) for module in model.modules()):
            return save_whole(stock, replaced_adapter, model, *args, **kwargs)
    elif isinstance(getattr(model, "hf_quantizer", None), QFTQuantizer):
        return save_whole(stock, replaced_checkpoint, model, *args, **kwargs)
    return stock(model, *args, **kwargs)


wrap_method(PreTrainedModel, "save_pretrained", _save_model)
