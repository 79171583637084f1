"""Estimates of models that are there."""

import logging

import pytest
import torch
from qft_models import FAMILIES, int8_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_quant import QFTConfig, estimate_memory
from peft_quant.estimate import estimate_qft
from peft_quant.estimate.layers import int8_weight
from peft_quant.qft.policy import int8_modules


TOKENS = torch.empty(1, 64, dtype=torch.long, device="meta")
INPUTS = {"input_ids": TOKENS, "labels": TOKENS}


def on_meta(config):
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
        for layer in int8_modules(model, QFTConfig()).values():
            layer.weight = int8_weight(layer, 0.01)
    return model


@pytest.fixture(scope="module")
def llama_7b():
    return on_meta(LlamaConfig())


def rows(report):
    return {row.what: row for row in report.rows}


@pytest.mark.parametrize("checkpointing", (True, False))
@pytest.mark.parametrize("fused", (True, False))
def test_is_what_its_config_says(fused, checkpointing):
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=9, num_attention_heads=4)
    method = "qft-fused" if fused else "qft-stack"
    planned = estimate_memory(config, method, sequence=64, checkpointing=checkpointing)
    assert estimate_qft(on_meta(config), INPUTS, fused=fused, checkpointing=checkpointing) == planned


@pytest.mark.parametrize(("fused", "share"), ((False, 0.21), (True, 0.14)))
def test_share_of_adam(llama_7b, fused, share):
    report = estimate_qft(llama_7b, None, fused=fused)
    assert report.parameters == 6_738_415_616
    assert share - 0.02 < report.share_of_adam < share


def test_values(llama_7b):
    found = rows(estimate_qft(llama_7b, None))
    assert found["weights"].values == 6_476_005_376
    # a square of the norm for each tensor comes with the gradients, a count of skipped steps with the momentum
    tensors = len(list(llama_7b.parameters()))
    blocks = sum(-(-p.numel() // 256) for p in llama_7b.parameters())
    assert found["optimizer"].values == 6_738_415_616 + blocks + tensors


def test_frozen_weights_have_neither_gradient_nor_momentum(llama_7b):
    embedding = llama_7b.model.embed_tokens.weight
    before = rows(estimate_qft(llama_7b, None))
    embedding.requires_grad_(False)
    try:
        after = rows(estimate_qft(llama_7b, None))
    finally:
        embedding.requires_grad_(True)
    for what in ("gradients", "optimizer"):
        assert before[what].bytes - after[what].bytes >= embedding.numel()
    assert before["rest of the model"] == after["rest of the model"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family):
    """A model of any task is counted, and stays as it is."""
    model = int8_model(family)
    inputs = {name: tensor.to("meta") for name, tensor in FAMILIES[family].inputs().items()}
    random = torch.get_rng_state()
    report = estimate_qft(model, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(parameter.is_meta or parameter.grad is not None for parameter in model.parameters())
    if family == "BART classifier":  # which looks for the end of the sequence
        assert not report.peak_known
    else:
        assert report.total > estimate_qft(model, None).states


def test_what_cannot_be_counted_has_its_states(caplog):
    model = int8_model("Llama")
    whole = estimate_qft(model, {name: t.to("meta") for name, t in FAMILIES["Llama"].inputs().items()})
    model.added = torch.nn.Embedding(3, 3)
    with caplog.at_level(logging.INFO, "peft_quant"):
        report = estimate_qft(model, INPUTS)
    assert (
        "not estimated: ValueError: the config makes a LlamaForCausalLM with other tensors, first added" in caplog.text
    )
    assert str(report).endswith("not estimated")
    assert rows(report)["weights"] == rows(whole)["weights"]
    assert rows(report)["scales"] == rows(whole)["scales"]
