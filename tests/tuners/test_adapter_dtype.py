"""`autocast_adapter_dtype`: adapters in fp32, or in the dtype of the base."""

import pytest
import torch
from gptq_models import PlainMLP, load
from peft import PeftModel, get_peft_model
from torch import nn

from peft_quant import LRECConfig, PEQAConfig


CONFIGS = {
    "peqa": lambda: PEQAConfig(task_type="CAUSAL_LM", init_weights=False),
    "lrec": lambda: LRECConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
}


@pytest.fixture
def model(checkpoint):
    return load(checkpoint, dtype=torch.bfloat16)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


def adapter(peft_model, name="default"):
    return {key: p for key, p in peft_model.named_parameters() if f".{name}" in key}


def dtypes(parameters):
    return {p.dtype for p in parameters.values()}


def test_without_autocasting_adapters_have_the_dtype_of_the_model(model, config):
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    peft_model.add_adapter("other", config)
    peft_model.add_adapter("third", config, autocast_adapter_dtype=False)
    assert dtypes(adapter(peft_model)) == dtypes(adapter(peft_model, "third")) == {torch.bfloat16}
    assert dtypes(adapter(peft_model, "other")) == {torch.float32}
    assert all(p.requires_grad for p in adapter(peft_model).values())


def test_without_a_dtype_of_the_model_it_is_that_of_the_scales(config):
    config.task_type = None
    peft_model = get_peft_model(PlainMLP(), config, autocast_adapter_dtype=False)
    assert dtypes(adapter(peft_model)) == {torch.float16}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading(model, checkpoint, config, tmp_path, low_cpu_mem_usage):
    saved = get_peft_model(model, config)
    saved.save_pretrained(tmp_path)
    values = adapter(saved)
    base = saved.unload()
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(base, tmp_path, **options)
        assert dtypes(adapter(loaded)) == {dtype}
        assert all(torch.equal(p, values[key].to(dtype)) for key, p in adapter(loaded).items())
        base = loaded.unload()


def test_sixteen_bit_adapters_compute_and_train(model, config, input_ids):
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        in_16_bits = peft_model(input_ids).logits
        for p in adapter(peft_model).values():
            p.data = p.data.float()
        assert torch.equal(in_16_bits, peft_model(input_ids).logits)
        for p in adapter(peft_model).values():
            p.data = p.data.bfloat16()
    before = {key: p.clone() for key, p in adapter(peft_model).items()}
    peft_model.train()(input_ids, labels=input_ids).loss.backward()
    assert {p.grad.dtype for p in adapter(peft_model).values()} == {torch.bfloat16}
    torch.optim.SGD(adapter(peft_model).values(), lr=0.1).step()
    assert all(not torch.equal(p, before[key]) for key, p in adapter(peft_model).items())


def test_parameters_stay_the_same_objects(model, config):
    peft_model = get_peft_model(model, config)
    before = adapter(peft_model)
    peft_model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    assert all(p is before[key] and isinstance(p, nn.Parameter) for key, p in adapter(peft_model).items())
