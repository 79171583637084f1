"""LoRA's option `bias`: biases of GPTQ layers, which are buffers, train like others."""

import warnings

import peft
import pytest
import torch
from gptq_models import PlainMLP, assert_loaded, load
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_quant import LRECConfig, export_lora, hotswap_adapter, inspect_adapter


OLD_PEFT = Version(peft.__version__) < Version("0.21")
needs_peft_21 = pytest.mark.skipif(OLD_PEFT, reason="PEFT 0.20 does not save biases")

OF_LAYERS = ["base_model.model.down.base_layer.bias", "base_model.model.up.base_layer.bias"]
OF_ALL = ["base_model.model.down.base_layer.bias", "base_model.model.head.bias", "base_model.model.up.base_layer.bias"]


def mlp():
    """Two packed layers with biases in fp16, and a float head."""
    model = PlainMLP()
    generator = torch.Generator().manual_seed(0)
    for layer in (model.up, model.down):
        layer.bias = torch.randn(layer.scales.shape[1], generator=generator).half()
    return model


def config(**options):
    return LRECConfig(**{"r": 4, "init_lora_weights": False, **options})


def x():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def trained(bias):
    model = get_peft_model(mlp(), config(bias=bias))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(x()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def biases(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


@needs_peft_21
@pytest.mark.parametrize(("bias", "names"), (("none", []), ("lora_only", OF_LAYERS), ("all", OF_ALL)))
def test_those_asked_for_train_in_fp32_and_are_saved(bias, names, tmp_path):
    before = dict(get_peft_model(mlp(), config()).state_dict())
    model = trained(bias)
    assert sorted(biases(model)) == names
    for name, parameter in biases(model).items():
        assert parameter.dtype == torch.float32
        assert not torch.allclose(parameter, before[name].float(), atol=1e-3)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(name for name in saved if "lora_" not in name) == names


@needs_peft_21
@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
@pytest.mark.parametrize("bias", ("lora_only", "all"))
def test_a_saved_adapter_comes_back(bias, low_cpu_mem_usage, tmp_path):
    model = trained(bias)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_loaded(loaded, model, lambda model: model(x()))


@needs_peft_21
def test_untrained_it_changes_nothing():
    plain = get_peft_model(mlp(), config(init_lora_weights=True))
    with torch.no_grad():
        assert torch.equal(get_peft_model(mlp(), config(init_lora_weights=True, bias="all"))(x()), plain(x()))


@needs_peft_21
def test_only_one_of_several_adapters_may_have_it():
    model = get_peft_model(mlp(), config(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", config(bias="lora_only"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("third", config())


@needs_peft_21
def test_it_is_not_combined_or_left_behind_by_a_swap(tmp_path):
    model = get_peft_model(mlp(), config(bias="all"))
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match=r"'default' trains biases \(bias='all'\), which cannot be combined"):
        model.add_weighted_adapter(["other", "default"], [1.0, 1.0], "sum", "cat")
    assert sorted(model.peft_config) == ["default", "other"]
    get_peft_model(mlp(), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="for bias, all != none"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")


@needs_peft_21
def test_disabling_the_adapter_says_that_biases_stay():
    model = trained("lora_only")
    with pytest.warns(UserWarning, match="bias configured to be 'lora_only'"), model.disable_adapter():
        pass


@needs_peft_21
@pytest.mark.parametrize(("bias", "warns"), (("none", False), ("all", True), ("lora_only", True)))
def test_a_model_without_biases_is_warned_of(checkpoint, bias, warns):
    model = load(checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config(bias=bias))
    assert any("there are no biases to train" in str(warning.message) for warning in caught) is warns


@needs_peft_21
def test_biases_go_with_an_export_and_are_named_as_what_they_are(tmp_path):
    trained("all").save_pretrained(tmp_path / "adapter")
    exported = export_lora(tmp_path / "adapter", tmp_path / "lora")
    first, second = (load_file(where / "adapter_model.safetensors") for where in (tmp_path / "adapter", exported))
    assert first.keys() == second.keys() >= set(OF_ALL)
    assert "| biases | 3 |" in (tmp_path / "adapter" / "README.md").read_text()
    assert inspect_adapter(tmp_path / "adapter").other_values == 64 + 96 + 8


@pytest.mark.skipif(not OLD_PEFT, reason="PEFT saves biases")
def test_older_versions_of_peft_are_refused():
    with pytest.raises(ValueError, match=r"bias='all' needs PEFT 0\.21"):
        get_peft_model(mlp(), config(bias="all"))


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="bias='some': use 'none', 'all' or 'lora_only'"):
        get_peft_model(mlp(), config(bias="some"))
