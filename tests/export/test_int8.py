"""Exports: what stock transformers makes of them is the model that was trained."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from gptq_models import float_llama, load, save_tiny_llama, tiny_tokenizer
from huggingface_hub import ModelCard
from optimum.gptq.constants import BLOCK_PATTERNS
from qft_models import assert_equal, contents, int8_llama, trainer
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_quant import Int8Weight, QFTConfig, convert_to_int8, export_qft, gptq
from peft_quant.export.int8 import _FOUND_BY_ITSELF
from peft_quant.gptq.check import PackedTensors, check_packed_tensors


NO_OUTLIERS = QFTConfig(outlier_ratio=0.0)


@torch.no_grad()
def logits(model, input_ids):
    return model.eval()(input_ids=input_ids).logits.float()


def in_bf16(error):
    """The largest error of logits, to two steps of bf16 at the largest: sums may be in another order."""
    return pytest.approx(error.largest, abs=2**-7 * error.largest_logit)


def error_of(loaded, model, input_ids):
    """In memory of PyTorch, as the export measures it, and not in the mapping of a file."""
    loaded = copy.deepcopy(loaded)
    return (logits(loaded, input_ids) - logits(model, input_ids)).abs().max().item()


class TestBF16:
    @pytest.mark.parametrize("config", (QFTConfig(), NO_OUTLIERS, QFTConfig(embeddings=True)), ids=vars)
    @pytest.mark.parametrize("tied", (False, True))
    def test_it_is_the_model(self, tmp_path, input_ids, config, tied):
        model = int8_llama(config, tie_word_embeddings=tied)
        before = contents(model)
        inputs = {"input_ids": input_ids}
        error = export_qft(model, tmp_path / "out", "bf16", inputs=inputs, tokenizer=tiny_tokenizer())
        assert error.largest_logit == logits(model, input_ids).abs().max().item()
        assert_equal(model, before)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.dtype == torch.bfloat16
        for name, parameter in model.named_parameters():
            dense = parameter.dequantize() if isinstance(parameter, Int8Weight) else parameter
            assert torch.equal(loaded.get_parameter(name), dense)
        # not zero on a CPU, where int8 weights are decoded to fp32
        assert error_of(loaded, model, input_ids) == in_bf16(error)
        assert error.largest < 0.05 * error.largest_logit
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert (tmp_path / "out" / "tokenizer.json").exists()

    def test_rounding_is_measured(self, tmp_path, input_ids):
        model = int8_llama(dtype=torch.float32)
        error = export_qft(model, tmp_path / "out", inputs={"input_ids": input_ids, "labels": input_ids})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        # in fp32, of which a difference of logits keeps fewer digits
        assert error_of(loaded, model, input_ids) == pytest.approx(error.largest, abs=1e-5 * error.largest_logit)
        assert 0 < error.mean < error.largest

    def test_without_peft_quant(self, tmp_path):
        export_qft(int8_llama(), tmp_path / "out")
        code = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("out")
assert "peft_quant" not in sys.modules
"""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def test_conv1d(self, tmp_path, input_ids):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=16))
        convert_to_int8(model.bfloat16().eval())
        export_qft(model, tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert error_of(loaded, model, input_ids) < 0.01 * logits(model, input_ids).abs().max()


class TestGPTQ:
    @pytest.mark.parametrize("config", (QFTConfig(), NO_OUTLIERS, QFTConfig(embeddings=True)), ids=vars)
    @pytest.mark.parametrize("tied", (False, True))
    def test_the_error_is_what_its_own_engine_makes(self, tmp_path, input_ids, config, tied):
        model = int8_llama(config, torch.float32, tie_word_embeddings=tied)
        error = export_qft(model, tmp_path / "out", "gptq", inputs={"input_ids": input_ids})
        loaded = load(tmp_path / "out", bits=8)
        # the engine rounds decoded weights to 16 bits
        assert error_of(loaded, model, input_ids) == pytest.approx(error.largest, abs=5e-3 * error.largest_logit)
        # without outliers nothing is lost: scales are chosen as fp16 has them
        assert (error.largest == 0) == (config.outlier_ratio == 0)
        assert error.largest < 0.1 * error.largest_logit
        quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert (quantization["bits"], quantization["group_size"], quantization["sym"]) == (8, -1, True)

    @pytest.mark.parametrize("signed", (False, True))
    @pytest.mark.parametrize("group_size", (-1, 32))
    def test_a_gptq_checkpoint_comes_back_as_it_was(self, tmp_path, input_ids, group_size, signed):
        base = save_tiny_llama(tmp_path / "base", 8, group_size, signed=signed)
        model = convert_to_int8(load(base, bits=8, dtype=torch.float16))
        error = export_qft(model, tmp_path / "out", "gptq", inputs={"input_ids": input_ids})
        assert error.largest == 0
        before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        configs = [json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "out")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    def test_trained_integers_are_written(self, tmp_path, input_ids):
        model = int8_llama(NO_OUTLIERS)
        run = trainer(tmp_path / "run", model)
        run.train()
        error = run.export(tmp_path / "out", "gptq")
        assert run.state.log_history[-1]["gptq_logit_error_largest"] == error.largest
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        layer = "model.layers.1.mlp.down_proj"
        packed = PackedTensors(*(tensors[f"{layer}.{name}"] for name in PackedTensors._fields))
        assert check_packed_tensors(layer, packed) == 8
        codes = packed.qweight.view(torch.uint8).view(-1, 64, 4).transpose(1, 2).reshape(96, 64).int() - 128
        assert torch.equal(codes.t(), model.get_parameter(f"{layer}.weight").codes.int())

    def test_tiny_scales(self, tmp_path, input_ids):
        model = float_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3] *= 1e-5  # below fp16's normal numbers, as scales
        convert_to_int8(model, NO_OUTLIERS)
        error = export_qft(model, tmp_path / "out", "gptq", inputs={"input_ids": input_ids})
        assert error.largest < 0.01 * error.largest_logit
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert all((tensor > 0).all() for name, tensor in tensors.items() if name.endswith(".scales"))

    def test_tiny_negative_scales(self, tmp_path):
        model = convert_to_int8(load(save_tiny_llama(tmp_path / "base", 8, signed=True), bits=8))
        layer = "model.layers.0.mlp.up_proj"
        weight = model.get_parameter(f"{layer}.weight")
        with torch.no_grad():
            weight.scales[3] = -1e-5  # below fp16's normal numbers
        export_qft(model, tmp_path / "out", "gptq")
        exported = load(tmp_path / "out", bits=8).get_submodule(layer)
        scales = exported.scales[:, 3].float()
        assert (scales == -(2.0**-14)).all()
        difference = gptq.dequantize(exported, gptq.read_format(exported))[3] - weight.dequantize(torch.float32)[3]
        assert (difference.abs() <= 2.0**-15).all()  # half a step

    def test_layers_left_in_float_are_named(self, tmp_path, input_ids):
        model = int8_llama(QFTConfig(modules_to_not_convert=["down_proj"]), torch.float32)
        export_qft(model, tmp_path / "out", "gptq")
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        (layers,) = config["modules_in_block_to_quantize"]
        assert sorted(layers) == layers
        assert "mlp.up_proj" in layers
        assert "mlp.down_proj" not in layers
        loaded = load(tmp_path / "out", bits=8)
        assert error_of(loaded, model, input_ids) < 0.1 * logits(model, input_ids).abs().max()

    def test_experts_and_routers(self, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
        config = Qwen2MoeConfig(**sizes, **experts, vocab_size=64, intermediate_size=32)
        torch.manual_seed(0)
        model = convert_to_int8(Qwen2MoeForCausalLM(config).bfloat16().eval())
        ids = torch.arange(8)[None]
        model.save_pretrained(tmp_path / "int8")
        assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "int8"), contents(model))
        error = export_qft(model, tmp_path / "bf16", inputs={"input_ids": ids})
        assert error_of(AutoModelForCausalLM.from_pretrained(tmp_path / "bf16"), model, ids) == in_bf16(error)
        assert error.largest < 0.05 * error.largest_logit

    def test_blocks_are_looked_for_where_optimum_does(self):
        assert set(_FOUND_BY_ITSELF) <= set(BLOCK_PATTERNS)

    def test_features_that_cannot_be_packed(self, tmp_path):
        model = int8_llama(intermediate_size=90)
        with pytest.raises(
            ValueError, match=r"gate_proj has 64 in- and 90 out-features, and GPTQ packs 8 bits in fours"
        ):
            export_qft(model, tmp_path / "out", "gptq")
        assert not (tmp_path / "out").exists()


class TestRefusals:
    def test_another_format(self, tmp_path):
        with pytest.raises(ValueError, match="format='int4': use 'bf16' or 'gptq'"):
            export_qft(int8_llama(), tmp_path / "out", "int4")

    def test_gptq_of_what_does_not_read_text(self, tmp_path):
        config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
        model = convert_to_int8(ViTForImageClassification(config))
        with pytest.raises(ValueError, match="a ViTForImageClassification reads pixel_values: export it as bf16"):
            export_qft(model, tmp_path / "out", "gptq")

    def test_an_error_of_logits_that_are_not_there(self, tmp_path, input_ids):
        model = convert_to_int8(float_llama().model)
        with pytest.raises(ValueError, match=r"`inputs` ask for the error of logits, .* export it without them"):
            export_qft(model, tmp_path / "out", inputs={"input_ids": input_ids})
        export_qft(model, tmp_path / "out")
        assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16

    def test_a_float_model(self, tmp_path):
        with pytest.raises(ValueError, match="has no weights in int8, so `save_pretrained` writes it"):
            export_qft(float_llama(), tmp_path / "out")

    def test_a_directory_that_exists(self, tmp_path):
        with pytest.raises(FileExistsError):
            export_qft(int8_llama(), tmp_path)


@pytest.mark.parametrize("format", ("bf16", "gptq"))
def test_the_card(tmp_path, input_ids, format):
    model = int8_llama(dtype=torch.float32)
    model.config._name_or_path = "user/base"
    error = export_qft(model, tmp_path / "out", format, inputs={"input_ids": input_ids})
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", "user/base")
    assert card.data.base_model_relation == "finetune"
    assert f"| largest difference | {error.largest:.3g} |" in card.text
    assert "import peft_quant" not in card.text
    assert ("## Served by" in card.text) == (format == "gptq")
    assert ("8-bit" in card.data.tags) == (format == "gptq")
