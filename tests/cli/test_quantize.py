"""`peft-quant quantize`."""

import json

import pytest
from gptq_models import load
from safetensors.torch import load_file


pytest.importorskip("gptqmodel")


@pytest.fixture
def quantize(run, models, text, tmp_path):
    def quantize(*options):
        own = ("--calibration", text, "--samples", 8, "--sequence-length", 16, "--group-size", 32)
        return run("quantize", models / "float", tmp_path / "out", *own, *options)

    return quantize


def test_a_checkpoint(quantize, tmp_path, input_ids):
    result = quantize("--bits", 8, "--asymmetric")
    assert result.code == 0, result.stderr
    assert "calibrated on 8 windows of 16 tokens" in result.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (8, 32, False)
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(tmp_path / "out" / "model.safetensors")
    assert load(tmp_path / "out", bits=8)(input_ids).logits.isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_output_that_is_there(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    result = quantize()
    assert result.code == 1
    assert result.stderr.startswith("error: ")
    assert "exists already" in result.stderr


def test_bits_that_gptq_has_not(quantize, tmp_path):
    result = quantize("--bits", 5)
    assert result.code == 1
    assert "5" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
