import math

import pytest
import torch

from peft_quant import LRECConfig, PEQAConfig
from peft_quant.adapter_files import check_adapter_config, check_adapter_dtypes
from peft_quant.reading import InvalidFileError


FILE = "adapter_config.json"
WRONG = (5.5, "text", True, [1], [["a"]], {"a": 1}, {"a": [[]]}, [None], math.nan, 10**400)
ACCEPTED = {
    "lora_alpha": (5.5,),
    "lora_dropout": (5.5,),
    "layers_to_transform": ([1],),
    "trainable_token_indices": ([1],),
    "rank_pattern": ({"a": 1},),
    "alpha_pattern": ({"a": 1},),
    "auto_mapping": ({"a": 1},),
    "base_quantization": ({"a": 1},),
    "init_lora_weights": ("text", True),
    **dict.fromkeys(("ensure_weight_tying", "inference_mode", "init_weights", "save_as_lora", "use_rslora"), (True,)),
    **dict.fromkeys(("modules_to_save", "r"), ()),
}


def options(config):
    return {name: list(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


@pytest.mark.parametrize(
    "config",
    (
        PEQAConfig(),
        LRECConfig(),
        PEQAConfig(target_modules=["q_proj"], layers_to_transform=[0, 1], layers_pattern="layers"),
        PEQAConfig(target_modules=".*q_proj", exclude_modules=["k_proj"], modules_to_save=["lm_head"]),
        LRECConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2.5}, init_lora_weights="gaussian"),
        LRECConfig(trainable_token_indices={"embed_tokens": [1, 2]}, bias="all", use_rslora=True),
        LRECConfig(trainable_token_indices=list(range(10_000)), layers_to_transform=3),
    ),
)
def test_what_is_saved_is_accepted(config):
    check_adapter_config(FILE, options(config), ours=True)


def test_what_older_versions_left_out():
    check_adapter_config(FILE, {"peft_type": "LORA"}, ours=False)
    check_adapter_config(FILE, {"peft_type": "LREC", "r": 8}, ours=True)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("option", (*ACCEPTED, "serving_dtype", "target_modules", "bias", "task_type", "revision"))
def test_other_types_are_refused(option, value):
    accepted = ACCEPTED.get(option, ("text",))
    if any(value is each or (type(value) is type(each) and value == each) for each in accepted):
        check_adapter_config(FILE, {"peft_type": "LREC", option: value}, ours=True)
        return
    with pytest.raises(InvalidFileError, match=rf"adapter_config\.json has {option}=.*, which is not "):
        check_adapter_config(FILE, {"peft_type": "LREC", option: value}, ours=True)


@pytest.mark.parametrize(
    ("option", "value"),
    (
        ("target_modules", ["a"] * 100_000),
        ("modules_to_save", ["a"] * 100_000),
        ("rank_pattern", {str(n): 1 for n in range(100_000)}),
        ("base_quantization", {str(n): 1 for n in range(100_000)}),
        ("base_quantization", {"bits": [4] * 100_000}),
        ("layers_to_transform", [0] * 100_000),
    ),
)
def test_too_many_entries_are_refused(option, value):
    with pytest.raises(InvalidFileError, match=f"has {option}=") as error:
        check_adapter_config(FILE, {"peft_type": "PEQA", option: value}, ours=True)
    assert len(str(error.value)) < 600


def test_dtypes():
    names = {"base_model.model.a.peqa_scales": torch.bfloat16, "base_model.model.b.position_ids": torch.int64}
    check_adapter_dtypes("file", names)
    for name, dtype in (
        ("base_model.model.a.peqa_scales", torch.int64),
        ("base_model.model.a.lora_A.weight", torch.bool),
        ("base_model.model.a.weight", torch.float8_e5m2),
        ("base_model.model.a.weight", None),
    ):
        with pytest.raises(InvalidFileError, match=f"file has {name} as"):
            check_adapter_dtypes("file", {name: dtype})
