import json

import pytest
from gptq_models import PlainLayer, PlainMLP
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_quant import LRECConfig, LRECModel


def test_is_registered_with_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LREC] is LRECConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LREC] is LRECModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LREC] == LRECModel.prefix == "lora_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


def test_round_trip_through_json(tmp_path):
    config = LRECConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=16,
        lora_dropout=0.1,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
        init_lora_weights="gaussian",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        base_quantization={"bits": 4, "fingerprint": "00"},
        base_fingerprint="11",
        bias="lora_only",
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LREC"
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_all_linear_goes_with_layers_to_transform():
    assert LRECConfig(target_modules="all-linear", layers_to_transform=[0]).target_modules is None


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"r": 0}, "r=0 .*positive"),
        ({"rank_pattern": {"q_proj": -1}}, "'q_proj': -1.*positive"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0.*below 1"),
        ({"init_lrec_weights": "pissa"}, "init_lrec_weights='pissa': use 'zero'"),
        ({"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
    ),
)
def test_contradictions_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LRECConfig(**options)


@pytest.mark.parametrize(
    "start", ("pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "orthogonal", "mica", "lora_ga", "other")
)
def test_starts_that_need_dense_weights_are_refused_on_a_model(start):
    model, config = PlainMLP(), LRECConfig()
    config.init_lora_weights = start
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*Use True or 'gaussian'"):
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
