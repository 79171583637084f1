"""Llamas with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_quant.ops.packed.packing import pack_zeros


SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}
VOCABULARY = 32000
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class RandomPackedLinear(nn.Module):
    """A symmetric GPTQ layer of random codes, with v1 zero points."""

    def __init__(self, rows: int, columns: int, bits: int, group_size: int, device: str) -> None:
        super().__init__()
        group_size = rows if group_size == -1 else group_size
        shape = (rows * bits // 32, columns)
        words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
        zeros = torch.full((rows // group_size, columns), 2 ** (bits - 1), device=device)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", pack_zeros(zeros, bits, 1))
        scales = torch.rand(rows // group_size, columns, device=device).add_(0.5).mul_(0.02 / 2 ** (bits - 1))
        self.register_buffer("scales", scales.half())
        self.register_buffer("g_idx", (torch.arange(rows, device=device) // group_size).int())
        self.infeatures, self.outfeatures, self.bits = rows, columns, bits
        self.checkpoint_format = "gptq"
        self.QUANT_TYPE = "random"


def make_llama(
    shape: str, device: str, quantize: Callable[[nn.Linear], nn.Module] | None = None, *, dense: bool = True
) -> LlamaForCausalLM:
    """A frozen model in bf16.

    Args:
        shape: one of `SHAPES`.
        device: device of its tensors.
        quantize: returns the replacement for a linear layer of a decoder block.
        dense: whether `quantize` gets layers with weights; otherwise they are on the meta device.
    """
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **SHAPES[shape])
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    if quantize:
        for block in model.model.layers:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, child = name.rpartition(".")
                    if dense:
                        _fill(module, device)
                    setattr(block.get_submodule(parent), child, quantize(module))
    _fill(model, device)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def save(shape: str, directory: Path) -> None:
    """Write a dense model and a byte tokenizer, for packages that train only from checkpoints."""
    part = directory.with_suffix(".part")
    make_llama(shape, "cuda" if torch.cuda.is_available() else "cpu").save_pretrained(part)
    alphabet = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(part)
    part.rename(directory)


def _fill(model: nn.Module, device: str) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty_like(parameter, device=device).normal_(std=0.02)
                value = value.fill_(1.0) if value.ndim == 1 else value
                setattr(module, name, nn.Parameter(value, requires_grad=False))
