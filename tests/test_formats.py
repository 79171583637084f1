"""What peft_quant 0.1.0 wrote is read as it was meant; adapters of it are in `tuners/test_saved.py`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_quant.trainers.distillation.cache import CachedTeacher


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "int8_0_1_0" / "expected.safetensors")


def test_an_int8_checkpoint(expected):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "int8_0_1_0").eval()
    weight = model.model.layers[0].mlp.up_proj.weight.dequantize(torch.float32)
    assert torch.equal(weight, expected["up_proj"])
    torch.testing.assert_close(model(torch.arange(12)[None]).logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_cache_of_a_teacher(expected):
    distribution = CachedTeacher(FIXTURES / "teacher_0_1_0")({"input_ids": torch.arange(12)[None]}).distribution
    log_probs = expected["teacher_logits"][0, :-1].log_softmax(-1)
    top = log_probs.topk(4)
    assert torch.equal(distribution.indices[:-1].long(), top.indices)
    torch.testing.assert_close(distribution.log_probs[:-1, :-1].float(), top.values, rtol=1e-3, atol=1e-3)  # in fp16
