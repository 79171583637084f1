import json

import pytest
from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


def test_is_registered_with_peft(method):
    peft_type = PeftType(method.name)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is method.config_class
    assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is method.tuner_class
    assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] == method.tuner_class.prefix == method.prefix
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


@pytest.mark.parametrize(
    ("method", "options"),
    (
        ("PEQA", {"serving_dtype": "bfloat16"}),
        (
            "LREC",
            {
                "lora_alpha": 16,
                "lora_dropout": 0.1,
                "use_rslora": True,
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 3},
                "init_lora_weights": "gaussian",
                "base_fingerprint": "11",
                "bias": "lora_only",
            },
        ),
    ),
    indirect=["method"],
)
def test_round_trip_through_json(method, options, tmp_path):
    config = method.config(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        base_quantization={"bits": 4, "fingerprint": "00"},
        **options,
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == method.name
    assert PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("method", "options", "message"),
    (
        ("PEQA", {"serving_dtype": "float16"}, "serving_dtype='float16'.*'bfloat16'"),
        ("PEQA", {"layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`"),
        ("PEQA", {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ("PEQA", {"target_modules": ".*q_proj", "layers_pattern": "h"}, "`layers_pattern` cannot be used"),
        ("LREC", {"r": 0}, "r=0 .*positive"),
        ("LREC", {"rank_pattern": {"q_proj": -1}}, "'q_proj': -1.*positive"),
        ("LREC", {"lora_dropout": 1.0}, "lora_dropout=1.0.*below 1"),
        ("LREC", {"init_lrec_weights": "pissa"}, "init_lrec_weights='pissa': use 'zero'"),
        ("LREC", {"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ("LREC", {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
    ),
    indirect=["method"],
)
def test_contradictions_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        method.config(**options)
