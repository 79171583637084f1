"""Quantization of a float checkpoint with GPTQ, by transformers and optimum."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from .checkpoint import new_directory
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
) -> Path:
    """Quantize a float model to a GPTQ checkpoint (Frantar et al., 2022, arXiv 2210.17323).

    Uses transformers' `GPTQConfig`. Symmetric checkpoints are written in the `gptq` (v1) format, which every engine
    reads; asymmetric ones in `gptq_v2`, which stores every zero point exactly. What is not quantized (embeddings,
    norms, output head) keeps the dtype of the float checkpoint.

    Args:
        model: directory or Hub id of the float model, with its tokenizer.
        out: directory to write, which must not exist; it appears once it is complete.
        calibration: texts, each used whole as one calibration sample.
        bits: 2, 3, 4 or 8.
        group_size: in-features that share a scale, or -1 for one scale per output channel.
        symmetric: fix every zero point at `2 ** (bits - 1)`.
        act_order: quantize columns in the order of decreasing activation (`desc_act`).

    Returns:
        The path of `out`.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no calibration text, or options GPTQ does not support.
    """
    if not calibration:
        raise ValueError("GPTQ needs calibration texts, got none.")
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
        quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
        written = quantized.config.quantization_config
        written.dataset = None  # its texts would be written to config.json
        written.tokenizer = None
        written.backend = "auto"
        written.format = "gptq" if symmetric else "gptq_v2"
        keep_checkpoint_format(quantized)
        float_dtype = AutoConfig.from_pretrained(model).dtype
        for parameter in quantized.parameters():
            parameter.data = parameter.data.to(float_dtype)
        quantized.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return Path(out)
