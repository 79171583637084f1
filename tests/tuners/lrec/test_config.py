import json

import pytest
from gptq_models import PlainLayer, PlainMLP
from peft import PeftConfig, get_peft_model

from peft_quant import LRECConfig


def test_all_linear_goes_with_layers_to_transform():
    assert LRECConfig(target_modules="all-linear", layers_to_transform=[0]).target_modules is None


@pytest.mark.parametrize(
    "initialization",
    ("pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "orthogonal", "mica", "lora_ga", "other"),
)
def test_initializations_that_need_dense_weights_are_refused_on_a_model(initialization):
    model, config = PlainMLP(), LRECConfig()
    config.init_lora_weights = initialization
    with pytest.raises(ValueError, match=f"init_lora_weights='{initialization}'.*Use True or 'gaussian'"):
        get_peft_model(model, config)
    assert isinstance(model.up, PlainLayer)


@pytest.mark.parametrize(
    "options",
    (
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"use_dora": True},
        {"use_qalora": True},
        {"qalora_group_size": 8},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"megatron_config": {"tensor_model_parallel_size": 2}},
        {"alora_invocation_tokens": [1, 2]},
        {"velora_config": {}},
    ),
)
def test_other_options_of_lora_are_refused_on_a_model_and_saved_in_a_file(options, tmp_path):
    (name,) = options
    config, model = LRECConfig(**options), PlainMLP()
    config.save_pretrained(tmp_path / "first")
    PeftConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        json.loads((tmp_path / where / "adapter_config.json").read_text()) for where in ("first", "second")
    )
    assert first == second
    assert first[name] == json.loads(json.dumps(config.to_dict()[name]))
    with pytest.raises(ValueError, match=f"{name}=.* is an option of LoRA that LREC does not have"):
        get_peft_model(model, config)
    assert isinstance(model.up, PlainLayer)
