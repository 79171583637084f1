"""Saving a model loaded by transformers gives a checkpoint that means what it says."""

import copy
import json

import pytest
import torch
from gptq_models import load, save_tiny_llama
from safetensors.torch import load_file

from peft_quant.gptq.zero_points import keep_checkpoint_format


FORMATS = ((2, False, False), (3, True, True), (4, True, False), (8, False, True))


@pytest.mark.parametrize("checkpoint_format", ("gptq", "gptq_v2"))
@pytest.mark.parametrize(("bits", "symmetric", "act_order"), FORMATS)
def test_saved_tensors_equal_the_base(tmp_path, bits, symmetric, act_order, checkpoint_format):
    base = save_tiny_llama(tmp_path / "base", bits, 32, symmetric, act_order, checkpoint_format)
    model = load(base, bits)
    keep_checkpoint_format(model)
    keep_checkpoint_format(model)
    model.save_pretrained(tmp_path / "saved")
    original, saved = (load_file(directory / "model.safetensors") for directory in (base, tmp_path / "saved"))
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[name], saved[name]) for name in original)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == checkpoint_format


def test_transformers_alone_shifts_the_zero_points(tmp_path, model, checkpoint):
    """The defect that the hooks are for: should it be mended one day, they can go."""
    model.save_pretrained(tmp_path / "saved")
    original, saved = (load_file(directory / "model.safetensors") for directory in (checkpoint, tmp_path / "saved"))
    assert not torch.equal(original["model.layers.0.mlp.up_proj.qzeros"], saved["model.layers.0.mlp.up_proj.qzeros"])


def test_models_within_models_translate_once(model, checkpoint):
    keep_checkpoint_format(model)
    keep_checkpoint_format(model.model)
    name = "model.layers.0.mlp.up_proj.qzeros"
    assert torch.equal(model.state_dict()[name], load_file(checkpoint / "model.safetensors")[name])
    before = model.get_submodule("model.layers.0.mlp.up_proj").qzeros.clone()
    model.load_state_dict(model.state_dict())
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").qzeros, before)


def test_state_dict_round_trip_and_memory_are_untouched(model, input_ids):
    keep_checkpoint_format(model)
    before = model.model.layers[0].mlp.up_proj.qzeros.clone()
    with torch.no_grad():
        expected = model(input_ids).logits
        state = model.state_dict()
        assert torch.equal(model.model.layers[0].mlp.up_proj.qzeros, before)
        model.load_state_dict(state)
        assert torch.equal(model(input_ids).logits, expected)


def test_a_state_dict_from_before_the_hooks_still_fits(model, input_ids):
    state = model.state_dict()
    keep_checkpoint_format(model)
    with torch.no_grad():
        expected = model(input_ids).logits
        model.load_state_dict(state)
        assert torch.equal(model(input_ids).logits, expected)


def test_hooks_survive_deepcopy(model, checkpoint):
    keep_checkpoint_format(model)
    name = "model.layers.0.mlp.up_proj.qzeros"
    original = load_file(checkpoint / "model.safetensors")[name]
    assert torch.equal(copy.deepcopy(model).state_dict()[name], original)
