"""A config is the user's own object: the adapter holds it and not a copy, and it can be used on more than one base."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from gptq_models import PlainMLP, load, save_tiny_llama
from peft import PeftModel, get_peft_model


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FILLED_IN = ("base_quantization", "base_fingerprint", "target_modules")


def filled_in(config):
    return {name: copy.copy(getattr(config, name, None)) for name in FILLED_IN}


def layers(model, method):
    return sorted(name for name, module in model.named_modules() if isinstance(module, method.layer_class))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("other") / "llama", seed=1)


@pytest.mark.parametrize("options", ({}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}), ids=str)
def test_the_adapter_holds_the_given_config(checkpoint, method, options, tmp_path, input_ids):
    config = method.config(changed=True, **options)
    tuned = get_peft_model(load(checkpoint), config).eval()
    assert tuned.peft_config["default"] is config
    tuned.save_pretrained(tmp_path)
    before = filled_in(config)
    loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert filled_in(config) == before
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=input_ids).logits, tuned(input_ids=input_ids).logits)


@pytest.mark.parametrize("options", ({}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}), ids=str)
def test_two_bases_under_one_config_are_each_saved_with_their_own(checkpoint, other, method, options, tmp_path):
    config = method.config(changed=True, **options)
    first = get_peft_model(load(checkpoint), config)
    before = filled_in(config)
    with pytest.warns(UserWarning, match="was renamed"):  # which PEFT says and does to the first model's config
        second = get_peft_model(load(other), config)
    assert first.peft_config["default"] is config
    assert filled_in(config) == before
    assert second.peft_config["default"].base_quantization != config.base_quantization
    for model, base, wrong in ((first, checkpoint, other), (second, other, checkpoint)):
        directory = tmp_path / base.parent.name
        model.save_pretrained(directory)
        assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        PeftModel.from_pretrained(load(base), directory)
        with pytest.raises(ValueError, match="trained on another base model"):
            PeftModel.from_pretrained(load(wrong), directory)


def test_default_targets_are_those_of_each_model(checkpoint, method):
    config = method.config()
    llama, mlp = get_peft_model(load(checkpoint), config), get_peft_model(PlainMLP(), config)
    assert len(layers(llama, method)) == 14
    assert layers(mlp, method) == ["base_model.model.down", "base_model.model.up"]
    assert llama.peft_config["default"].target_modules != mlp.peft_config["default"].target_modules == {"down", "up"}


@pytest.mark.parametrize("targets", ({"q_proj"}, set(PROJECTIONS)))
def test_targets_that_the_user_changes_are_respected(checkpoint, method, targets):
    config = method.config()
    get_peft_model(load(checkpoint), config)
    config.target_modules = targets
    assert len(layers(get_peft_model(load(checkpoint), config), method)) == 2 * len(targets)
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(PlainMLP(), config)


def from_dict(config):
    return type(config).from_peft_type(**config.to_dict())


@pytest.mark.parametrize("derive", (copy.deepcopy, replace, from_dict))
def test_what_is_made_of_a_used_config_is_bound_to_no_base(checkpoint, other, method, derive):
    config = method.config(target_modules=["q_proj"])
    get_peft_model(load(checkpoint), config)
    derived = derive(config)
    second = get_peft_model(load(other), derived)
    assert second.peft_config["default"].base_quantization != config.base_quantization


def test_a_second_adapter_of_the_same_model_may_share_it(checkpoint, method):
    config = method.config()
    tuned = get_peft_model(load(checkpoint), config)
    tuned.add_adapter("other", config)
    assert tuned.peft_config["other"] is config


def test_an_error_leaves_it_as_it_was(checkpoint, method):
    config = method.config(target_modules=["lm_head", "q_proj"])
    before = filled_in(config)
    with pytest.raises(ValueError, match="lm_head, a Linear without GPTQ-packed"):
        get_peft_model(load(checkpoint), config)
    assert filled_in(config) == before
