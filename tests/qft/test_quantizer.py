"""int8 checkpoints, saved and loaded by transformers' own calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gptq_models import float_llama
from qft_models import assert_equal, contents, int8_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import peft_quant
from peft_quant import Int8Weight, InvalidCheckpointError, QFTConfig
from peft_quant.qft import QFTQuantizer
from peft_quant.qft.checkpoint import flatten
from peft_quant.registry import register_quantization


CONFIGS = (QFTConfig(), QFTConfig(outlier_ratio=0.0), QFTConfig(embeddings=True))
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8") / "llama"
    int8_llama().save_pretrained(directory)
    return directory


def changed(saved, directory, change):
    """A copy of the checkpoint with other tensors or another quantization config."""
    tensors = load_file(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    change(tensors, config["quantization_config"])
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class TestRoundTrip:
    @pytest.mark.parametrize("tied", (False, True))
    @pytest.mark.parametrize("config", CONFIGS, ids=vars)
    @pytest.mark.parametrize("size", ("50GB", "20KB"))
    def test_bit_equal(self, tmp_path, config, tied, size):
        model = int8_llama(config, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
        assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (size == "20KB")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values())
        assert_equal(loaded, model)
        assert loaded.lm_head.weight.dtype == torch.bfloat16
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert all(p.requires_grad for p in loaded.parameters())
        loaded.save_pretrained(tmp_path / "again", max_shard_size=size)
        assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)

    def test_in_another_dtype(self, saved):
        loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        weight = loaded.get_parameter(f"{UP}.weight")
        assert (weight.dtype, loaded.model.norm.weight.dtype) == (torch.float32, torch.float32)
        assert torch.equal(weight.codes, load_file(saved / "model.safetensors")[f"{UP}.codes"])

    def test_a_float_checkpoint_is_quantized_on_the_way(self, tmp_path):
        float_llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path)
        for config in CONFIGS:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
            assert_equal(loaded, int8_llama(config, tie_word_embeddings=True))
            assert isinstance(loaded.lm_head.weight, Int8Weight) == config.embeddings

    def test_a_process_of_its_own(self, saved, tmp_path, input_ids):
        code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
import peft_quant
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
torch.save(model(torch.tensor({input_ids.tolist()})).logits, "logits.pt")
assert "transformers.trainer" not in sys.modules and "gptqmodel" not in sys.modules
"""
        environment = {**os.environ, "PYTHONPATH": str(Path(peft_quant.__file__).parents[1])}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        expected = AutoModelForCausalLM.from_pretrained(saved)(input_ids).logits
        assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)

    def test_it_may_be_trained_and_is_not_what_others_call_8_bit(self, saved):
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert model.hf_quantizer.is_trainable
        assert model.hf_quantizer.is_qat_trainable
        assert not getattr(model, "is_loaded_in_8bit", False)
        assert model.config.quantization_config.to_dict() == {
            "quant_method": "qft",
            "outlier_ratio": 0.01,
            "embeddings": False,
            "modules_to_not_convert": None,
            "experts_apart": False,
        }

    def test_registering_twice_changes_nothing(self):
        register_quantization("qft", QFTConfig, QFTQuantizer)
        with pytest.raises(RuntimeError, match="has a quantization named gptq already"):
            register_quantization("gptq", QFTConfig, QFTQuantizer)


def _drop(part):
    return lambda tensors, config: tensors.pop(f"{UP}.{part}")


def _set(part, value):
    return lambda tensors, config: tensors.update({f"{UP}.{part}": value(tensors[f"{UP}.{part}"])})


def _to_float(tensors, config):
    rows, columns = tensors[f"{UP}.codes"].shape
    for part in ("codes", "scales", "outlier_columns", "outlier_values"):
        del tensors[f"{UP}.{part}"]
    tensors[f"{UP}.weight"] = torch.zeros(rows, columns)


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "message"),
        (
            (_drop("scales"), "it has codes and no scales"),
            (_drop("codes"), "it has scales and no codes"),
            (_drop("outlier_values"), "outlier_columns and outlier_values come together"),
            (_set("codes", lambda t: t[:, :32].contiguous()), r"codes have shape \(96, 32\), the model's weight"),
            (_set("codes", lambda t: t.int()), r"codes are an int8 matrix, found torch\.int32"),
            (_set("scales", lambda t: t * torch.nan), "scales are finite and not zero"),
            (_set("scales", lambda t: t[:5].contiguous()), r"scales are fp32 \[96, G\]"),
            (_set("outlier_columns", lambda t: t + 64), "outlier_columns ascend within 0 to 63"),
            (_set("outlier_values", lambda t: t / 0), "outlier_values are finite"),
        ),
    )
    def test_of_parts(self, saved, tmp_path, change, message):
        directory = changed(saved, tmp_path / "damaged", change)
        with pytest.raises(InvalidCheckpointError, match=f"{UP} is not a valid int8 weight: {message}"):
            AutoModelForCausalLM.from_pretrained(directory)

    @pytest.mark.parametrize(
        ("change", "message"),
        (
            (lambda t, c: c.update(modules_to_not_convert=["up_proj"]), "has 2 weights in int8, .*leaves in float"),
            (lambda t, c: c.update(embeddings=True), "has 1 weights in float, first model.embed_tokens"),
            (_to_float, f"has 1 weights in float, first {UP}, .*puts in int8"),
        ),
    )
    def test_of_the_policy(self, saved, tmp_path, change, message):
        directory = changed(saved, tmp_path / "other", change)
        with pytest.raises(InvalidCheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(directory)

    @pytest.mark.parametrize("name", (f"{UP}.weight", f"{UP}.codes".removeprefix("model.")))
    def test_of_a_weight_that_is_there_twice(self, saved, tmp_path, name):
        directory = changed(saved, tmp_path / "twice", lambda t, c: t.update({name: t[f"{UP}.codes"].clone()}))
        with pytest.raises(InvalidCheckpointError, match=rf"{UP}\.weight is in .* more than once, as .*{name}"):
            AutoModelForCausalLM.from_pretrained(directory)

    def test_of_the_file(self, saved, tmp_path):
        directory = changed(saved, tmp_path / "short", lambda tensors, config: None)
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        # transformers reads the dtype of the file before it asks the quantizer, if it is not given
        with pytest.raises(InvalidCheckpointError, match="truncated or damaged"):
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def test_offloading_to_the_disk(self, saved):
        with pytest.raises(ValueError, match="cannot be offloaded to disk"):
            AutoModelForCausalLM.from_pretrained(saved, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_weight_of_two_names_is_saved_under_the_one_it_is_tied_to():
    weight = Int8Weight.from_dense(torch.randn(4, 8), 0)
    state = {"head.weight": weight, "table.weight": weight}
    assert flatten(state, tied={"head.weight"}).keys() == {"table.codes", "table.scales"}
    assert flatten(state).keys() == {"head.codes", "head.scales"}


def test_other_models_are_saved_as_before(tmp_path):
    model = float_llama()
    model.save_pretrained(tmp_path)
    assert_equal(LlamaForCausalLM.from_pretrained(tmp_path), contents(model))
