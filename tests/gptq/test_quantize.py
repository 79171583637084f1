"""Which models and layers are quantized, and what is refused before anything is calibrated."""

import json

import pytest
import torch
from families import FAMILIES
from gptq_models import float_llama, load, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_quant.gptq.quantize import quantize_checkpoint
from peft_quant.gptq.source import packed_modules


TEXTS = [" ".join(f"w{(7 * sample + 3 * word) % 125}" for word in range(32)) for sample in range(8)]


@pytest.fixture
def quantize(tmp_path, monkeypatch):
    """Quantizes a float model; what is refused must be so before the first layer."""

    def quantize(model, **options):
        model.save_pretrained(tmp_path / "float")
        tiny_tokenizer().save_pretrained(tmp_path / "float")
        return quantize_checkpoint(tmp_path / "float", tmp_path / "out", TEXTS, group_size=32, **options)

    return quantize


@pytest.fixture
def refused(quantize, tmp_path, monkeypatch):
    def calibrated(*args, **kwargs):
        raise AssertionError("it was calibrated")

    monkeypatch.setattr("optimum.gptq.quantizer.GPTQ.add_batch", calibrated)

    def refused(model, message, **options):
        with pytest.raises(ValueError, match=message):
            quantize(model, **options)
        assert not (tmp_path / "out").exists()

    return refused


@pytest.mark.parametrize("name", ("Qwen3-MoE", "Mixtral", "GPT-OSS"))
def test_every_expert(quantize, name):
    family = FAMILIES[name]
    out = quantize(family.float_model())
    stored = [tensor for tensor in load_file(out / "model.safetensors") if tensor.endswith(".qweight")]
    assert sum(".experts." in tensor for tensor in stored) == 2 * 4 * 3
    model = family.load(out)
    assert len(packed_modules(model)) == len(stored) == 2 * (4 + 4 * 3)
    if name == "Mixtral":
        assert "model.layers.0.block_sparse_moe.experts.0.w1.qweight" in stored  # as on the Hub


def test_what_is_excluded(quantize):
    out = quantize(float_llama(), exclude=["down_proj", "model.layers.0.self_attn.q_proj"])
    model = load(out)
    assert len(packed_modules(model)) == 14 - 3
    float_model = AutoModelForCausalLM.from_pretrained(out.parent / "float")
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, float_model.model.layers[1].mlp.down_proj.weight)
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(declared["dynamic"]) == {r"-:.*\.?down_proj$", r"-:.*\.?model\.layers\.0\.self_attn\.q_proj$"}


def test_a_name_that_fits_no_layer(refused):
    refused(float_llama(), "exclude has 'up', but no layer name of LlamaForCausalLM ends with it", exclude=["up"])


def test_layers_that_cannot_be_packed(refused):
    model = FAMILIES["Qwen2-MoE"].float_model()
    refused(model, r"shared_expert_gate first: it has 64 in- and 1 out-features.*--exclude shared_expert_gate")


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("Whisper", "is a WhisperForConditionalGeneration. Only causal language models are quantized here"),
        ("Qwen2.5-VL", "is a Qwen2_5_VLForConditionalGeneration"),
        ("T5", "is a T5ForConditionalGeneration"),
        ("Mamba-2", "optimum does not know the blocks of Mamba2ForCausalLM"),
    ),
)
def test_models_whose_checkpoints_transformers_does_not_load(refused, name, message):
    refused(FAMILIES[name].float_model(), message)


def test_experts_that_are_not_taken_apart(refused, monkeypatch):
    monkeypatch.setattr("defuser.convert_model", lambda model: False)
    refused(FAMILIES["Qwen3-MoE"].float_model(), "in one tensor, which defuser does not split")
