import json

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_quant import PEQAConfig, PEQAModel


def test_is_registered_with_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PEQA] is PEQAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PEQA] is PEQAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PEQA] == PEQAModel.prefix == "peqa_"


def test_round_trip_through_json(tmp_path):
    config = PEQAConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        serving_dtype="bfloat16",
        base_quantization={"bits": 4, "fingerprint": "00"},
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEQA"
    assert PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"serving_dtype": "float16"}, "serving_dtype='float16'.*'bfloat16'"),
        ({"layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": ".*q_proj", "layers_pattern": "h"}, "`layers_pattern` cannot be used"),
    ),
)
def test_contradictions_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PEQAConfig(**options)
