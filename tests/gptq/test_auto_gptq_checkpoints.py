"""Checkpoints written by the real auto-gptq 0.7.1 (`fixtures/make_auto_gptq.py`), with the logits it computed."""

from pathlib import Path

import pytest
import torch
from gptq_models import load
from peft import get_peft_model
from safetensors.torch import load_file

from peft_quant import PEQAConfig, merge_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize(
    ("name", "bits", "symmetric", "act_order"),
    (("auto_gptq_4bit_asym", 4, False, False), ("auto_gptq_3bit_act_order", 3, True, True)),
)
def test_loads_computes_and_merges(name, bits, symmetric, act_order, tmp_path):
    directory = FIXTURES / name
    expected = load_file(directory / "expected.safetensors")
    model = get_peft_model(load(directory, bits), PEQAConfig(task_type="CAUSAL_LM", init_weights=True)).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    # both compute in fp32; one wrong code moves the logits by 3e-2
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    recorded = model.peft_config["default"].base_quantization
    assert (recorded["bits"], recorded["sym"], recorded["desc_act"]) == (bits, symmetric, act_order)
    assert recorded["checkpoint_format"] == "gptq"

    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(directory, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
