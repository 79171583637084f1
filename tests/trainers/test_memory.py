"""Bytes of a run, before it runs: shapes as large as they are meant for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_quant import Int8Weight, QFTConfig
from peft_quant.qft.policy import int8_modules
from peft_quant.trainers.memory import memory_report


@pytest.fixture(scope="module")
def llama_7b():
    """Llama-2-7B's shape, with 1 % of outliers, without memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).bfloat16()
        for layer in int8_modules(model, QFTConfig()).values():
            rows, columns = layer.weight.shape
            outliers = round(0.01 * columns)
            parts = [
                torch.empty(rows, columns, dtype=torch.int8),
                torch.empty(rows, 1),
                torch.empty(rows, outliers, dtype=torch.int16),
                torch.empty(rows, outliers),
            ]
            layer.weight = torch.nn.Parameter(Int8Weight(*parts, dtype=torch.bfloat16))
    return model


@pytest.mark.parametrize(("fused", "share"), ((False, 0.21), (True, 0.14)))
def test_share_of_adam(llama_7b, fused, share):
    report = memory_report(llama_7b, fused=fused)
    assert report.parameters == 6_738_415_616
    assert share - 0.02 < report.share_of_adam < share


def test_rows(llama_7b):
    rows = {row.what: row for row in memory_report(llama_7b, batch=(1, 2048), checkpointing=True).rows}
    assert rows["weights"].values == 6_476_005_376
    assert rows["float parameters"].values == 6_738_415_616 - 6_476_005_376
    # 6 bytes each: the value and its column
    assert rows["outliers"].bytes == 6 * rows["outliers"].values
    assert rows["gradients"].values == rows["momentum"].values == 6_738_415_616
    assert rows["checkpointed activations"].bytes == 32 * 2048 * 4096 * 2
    assert rows["logits"].values == 2048 * 32000


def test_frozen_weights_have_neither_gradient_nor_momentum(llama_7b):
    embedding = llama_7b.model.embed_tokens.weight.requires_grad_(False)
    try:
        rows = {row.what: row for row in memory_report(llama_7b).rows}
    finally:
        embedding.requires_grad_(True)
    assert rows["momentum"].values == 6_738_415_616 - embedding.numel()
