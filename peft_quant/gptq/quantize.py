"""Quantization of a float checkpoint with GPTQ, by transformers and optimum."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig
from transformers.quantizers import AutoHfQuantizer

from .checkpoint import new_directory
from .finished_layers import kept
from .zero_points import keep_checkpoint_format


def quantize_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: list[str],
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    state: str | os.PathLike[str] | None = None,
) -> Path:
    """Quantize a float model to a GPTQ checkpoint (Frantar et al., 2022, arXiv 2210.17323).

    Uses transformers' `GPTQConfig`. Symmetric checkpoints are written in the `gptq` (v1) format, which every engine
    reads; asymmetric ones in `gptq_v2`, which stores every zero point exactly. What is not quantized (embeddings,
    norms, output head) keeps the dtype of the float checkpoint.

    With `state`, each layer is kept there once it is finished. Interrupted, it goes on after the last one when called
    again with the same arguments, and on the same device with as many threads writes the same checkpoint to the bit.
    Until `out` is complete, `state` takes about one byte on the disk for each weight that is quantized.

    Args:
        model: directory or Hub id of the float model, with its tokenizer.
        out: directory to write, which must not exist; it appears once it is complete.
        calibration: texts, each used whole as one calibration sample.
        bits: 2, 3, 4 or 8.
        group_size: in-features that share a scale, or -1 for one scale per output channel.
        symmetric: fix every zero point at `2 ** (bits - 1)`.
        act_order: quantize columns in the order of decreasing activation (`desc_act`).
        state: directory for finished layers; new, or one that an interrupted call left. It is removed at the end.

    Returns:
        The path of `out`.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no calibration text, options GPTQ does not support, a model that is quantized already, or a `state`
            of another model, calibration or version, or with other options.
    """
    if not calibration:
        raise ValueError("GPTQ needs calibration texts, got none.")
    float_config = AutoConfig.from_pretrained(model)
    if getattr(float_config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantized already: give the float model that it was made of.")
    with new_directory(out) as directory:
        config = GPTQConfig(
            bits=bits,
            group_size=group_size,
            sym=symmetric,
            desc_act=act_order,
            act_group_aware=group_size > 0 and not act_order,
            dataset=calibration,
            tokenizer=os.fspath(model),
            backend="gptq_torch",
        )
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment()
        quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        quantizer.preprocess_model(quantized)
        options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "act_order": act_order}
        with kept(quantized, state, calibration, options) if state is not None else nullcontext():
            quantizer.postprocess_model(quantized)
        quantized.hf_quantizer = quantizer
        written = quantized.config.quantization_config
        written.dataset = None  # its texts would be written to config.json
        written.tokenizer = None
        written.backend = "auto"
        written.format = "gptq" if symmetric else "gptq_v2"
        keep_checkpoint_format(quantized)
        for parameter in quantized.parameters():
            parameter.data = parameter.data.to(float_config.dtype)
        quantized.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    if state is not None and Path(state).exists():
        shutil.rmtree(state)
    return Path(out)
