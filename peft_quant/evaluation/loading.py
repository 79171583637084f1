"""Models from the directory or Hub id of any checkpoint or adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig
from transformers.utils import cached_file, find_adapter_config_file

from ..gptq.checkpoint import LEGACY_CONFIG
from ..gptq.source import require_whole
from ..model_config import read_model_config
from ..reading import read_json


def load_model(
    name: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> Any:
    """Load a causal language model: a float, GPTQ or int8 checkpoint, or an adapter on the base that it names.

    GPTQ layers keep their packed tensors as they are in the checkpoint (`backend="gptq_torch"`), so that they can be
    trained.

    Args:
        name: directory or Hub id.
        dtype: the dtype of unquantized tensors and of the computation, to which scales are rounded in use.
        device: where to load the model; by default the GPU if there is one.

    Returns:
        A [`~transformers.PreTrainedModel`] or, for an adapter, a [`~peft.PeftModel`].

    Raises:
        OSError: there is no such checkpoint.
        ValueError: the adapter names no base, or a base it was not trained on.
        InvalidCheckpointError: a layer is packed in the files and not in the model, or the reverse.
    """
    base = adapter_base(name)
    if base is not None:
        return PeftModel.from_pretrained(load_model(base, dtype=dtype, device=device), os.fspath(name))
    options: dict[str, Any] = {}
    if quantization_of(name) == "gptq":
        options["quantization_config"] = GPTQConfig(bits=4, backend="gptq_torch")  # `bits` is the checkpoint's own
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cpu":
        options["device_map"] = device
    model = AutoModelForCausalLM.from_pretrained(os.fspath(name), dtype=dtype, **options)
    require_whole(model)
    return model


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a checkpoint or an adapter: its own, or else that of its base."""
    base = adapter_base(name)
    if base is not None and not Path(name, "tokenizer_config.json").is_file():
        name = base
    return AutoTokenizer.from_pretrained(os.fspath(name))


def adapter_base(name: str | os.PathLike[str]) -> str | None:
    """The base that an adapter names; None if `name` is no adapter.

    Raises:
        InvalidFileError: its `adapter_config.json` is damaged.
        ValueError: the adapter names none.
    """
    file = None if Path(name, "config.json").is_file() else find_adapter_config_file(os.fspath(name))
    if file is None:
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{name} does not name its base: set base_model_name_or_path in its adapter_config.json.")
    return base


def quantization_of(name: str | os.PathLike[str]) -> str | None:
    """The `quant_method` of a checkpoint, from its config; None if it is not quantized.

    Raises:
        InvalidFileError: the config is damaged, or transformers cannot use it.
        OSError: there is no config.
    """
    config = getattr(read_model_config(name), "quantization_config", None) or {}
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    if method is None and _has_legacy_config(name):
        return "gptq"
    return None if method is None else str(getattr(method, "value", method))


def _has_legacy_config(name: str | os.PathLike[str]) -> bool:
    return cached_file(os.fspath(name), LEGACY_CONFIG, _raise_exceptions_for_missing_entries=False) is not None
