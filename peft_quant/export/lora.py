"""LREC adapters as LoRA adapters."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftConfig, PeftModel
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..files import new_directory
from ..tuners.layer import check_finite
from ..tuners.lrec.config import LRECConfig
from ..tuners.saved import load_config, load_weights
from .card import best_effort, update_card


def export_lora(
    adapter: str | os.PathLike[str] | PeftModel,
    out: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    token: str | bool | None = None,
) -> Path:
    """Write an LREC adapter as a LoRA adapter, for PEFT without peft_quant and for engines that load LoRA.

    With `LRECConfig(save_as_lora=True)`, adapters are saved in this format.

    The tensors are the same. The configuration becomes a `LoraConfig`, which cannot record the fingerprint of the base
    model; the model card does. `out` appears once it is complete.

    Args:
        adapter: directory or Hub id of the adapter, or a model with the adapter loaded.
        out: directory to write, which must not exist.
        adapter_name: name of the adapter, if a model is given.
        token: Hub token.

    Returns:
        The path of `out`.

    Raises:
        FileExistsError: `out` exists.
        InvalidFileError: a file of the adapter is damaged.
        ValueError: it is not an LREC adapter, holds NaN or infinite values, or the model has no adapter of that name.
    """
    if isinstance(adapter, PeftModel):
        with TemporaryDirectory() as saved:
            adapter.save_pretrained(saved, selected_adapters=[adapter_name])
            directory = saved if adapter_name == "default" else Path(saved, adapter_name)
            written = PeftConfig.from_pretrained(os.fspath(directory))
            return _export(directory, adapter.peft_config[adapter_name], written, out, token)
    config = load_config(adapter, token=token)
    return _export(adapter, config, config, out, token)


def _export(
    adapter: str | os.PathLike[str],
    config: PeftConfig,
    written: PeftConfig,
    out: str | os.PathLike[str],
    token: str | bool | None,
) -> Path:
    """Export an adapter; `written` is the configuration beside its weights, LoRA's with `save_as_lora`."""
    if not isinstance(config, LRECConfig):
        raise ValueError(
            f"{adapter} is a {config.peft_type.value} adapter. Only LREC adapters are LoRA's but for a name."
        )
    lora = written.to_lora() if isinstance(written, LRECConfig) else written
    weights = load_weights(adapter, token=token)
    for name, tensor in weights.items():
        check_finite(f"{adapter}: {name}", tensor)
    with new_directory(out) as directory:
        lora.save_pretrained(os.fspath(directory))
        save_file(weights, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        with best_effort(out):
            update_card(directory, facts={"base_quantization": config.base_quantization}, exported=True)
    return Path(out)
