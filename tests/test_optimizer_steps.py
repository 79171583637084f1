"""Steps whose gradients are not finite, whoever takes them."""

import copy
import gc
import logging
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from gptq_models import PlainMLP
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Adafactor

from peft_quant import LRECConfig, PEQAConfig, TrainingError, prepare_gptq_for_training
from peft_quant.optimizer_steps import MAX_SKIPPED_STEPS


NAN = float("nan")
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True),
    "Adafactor": lambda parameters: Adafactor(parameters, lr=1e-3, relative_step=False, weight_decay=0.1),
}


@pytest.fixture(params=(PEQAConfig, LRECConfig))
def peft_model(request):
    return get_peft_model(PlainMLP(), request.param())


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, factor=1.0):
    (model(torch.ones(3, 64)).pow(2).mean() * factor).backward()


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    backward(model, factor)
    optimizer.step()


def contents(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class TestAStepThatIsNotFinite:
    @pytest.mark.parametrize("value", (NAN, float("inf"), -float("inf")))
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_changes_nothing(self, peft_model, name, value):
        optimizer = OPTIMIZERS[name](trainable(peft_model))
        step(peft_model, optimizer)
        before = contents(peft_model, optimizer)
        optimizer.zero_grad()
        backward(peft_model)
        trainable(peft_model)[0].grad.view(-1)[-1] = value
        optimizer.step()
        assert_equal(contents(peft_model, optimizer), before)
        assert peft_model.skipped_steps == 1
        step(peft_model, optimizer)
        assert not any(torch.equal(p, before[0][name]) for name, p in peft_model.named_parameters() if p.requires_grad)
        assert peft_model.skipped_steps == 1

    def test_is_no_first_step(self, peft_model):
        optimizer = torch.optim.SGD(trainable(peft_model), lr=1e-4)
        step(peft_model, optimizer, NAN)
        optimizer.zero_grad()
        with pytest.raises(TrainingError, match="none of the 2 adapter tensors"):
            optimizer.step()

    def test_of_clipped_or_accumulated_gradients(self, peft_model):
        optimizer = torch.optim.SGD(trainable(peft_model), lr=1e-4)
        step(peft_model, optimizer)
        before = contents(peft_model, optimizer)
        optimizer.zero_grad()
        for factor in (1.0, NAN, 1.0):
            backward(peft_model, factor)
        torch.nn.utils.clip_grad_norm_(trainable(peft_model), 1.0)
        optimizer.step()
        assert_equal(contents(peft_model, optimizer), before)
        assert peft_model.skipped_steps == 1

    def test_of_modules_that_are_trained_whole(self):
        model = get_peft_model(PlainMLP(), PEQAConfig(modules_to_save=["head"]))
        optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
        backward(model)
        model.base_model.model.head.modules_to_save["default"].bias.grad[0] = NAN
        optimizer.step()
        assert model.skipped_steps == 1
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_of_parameters_that_were_added_later(self):
        model = get_peft_model(PlainMLP(), PEQAConfig())
        first, second = trainable(model)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
        optimizer.step()
        optimizer.add_param_group({"params": [first, second]})
        step(model, optimizer, NAN)
        assert model.skipped_steps == 1


class TestOtherSteps:
    def test_large_gradients_are_finite(self, peft_model):
        optimizer = torch.optim.SGD(trainable(peft_model), lr=1e-45)
        backward(peft_model)
        for parameter in trainable(peft_model):
            parameter.grad.fill_(3e38)
        optimizer.step()
        assert peft_model.skipped_steps == 0

    def test_of_other_models_are_left_alone(self, peft_model):
        other = nn.Linear(2, 2)
        other.weight.grad = torch.full_like(other.weight, NAN)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert other.weight.isnan().all()
        assert peft_model.skipped_steps == 0

    def test_of_lora_are_left_alone(self):
        model = get_peft_model(prepare_gptq_for_training(PlainMLP()), LoraConfig(target_modules=["head"]))
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        step(model, optimizer, NAN)
        assert not all(parameter.isfinite().all() for parameter in trainable(model))

    def test_of_a_model_without_adapters_are_left_alone(self, peft_model):
        model = peft_model.unload()
        model.head.weight.grad = torch.full_like(model.head.weight, NAN)
        torch.optim.SGD(model.head.parameters(), lr=0.1).step()
        assert model.head.weight.isnan().all()

    @pytest.mark.parametrize("name", ("SGD", "fused AdamW"))
    def test_that_a_gradient_scaler_skips_are_its_own(self, peft_model, name):
        optimizer = OPTIMIZERS[name](trainable(peft_model))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor, scale in ((1.0, 8.0), (float("inf"), 4.0), (1.0, 4.0)):
            optimizer.zero_grad()
            scaler.scale(peft_model(torch.ones(3, 64)).pow(2).mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == scale
        assert peft_model.skipped_steps == 0
        assert all(p.isfinite().all() for p in trainable(peft_model))


class TestHowMany:
    def test_are_logged_whenever_their_number_has_doubled(self, peft_model, caplog):
        optimizer = torch.optim.SGD(trainable(peft_model), lr=1e-4)
        for _ in range(5):
            step(peft_model, optimizer, 1.0)
            step(peft_model, optimizer, NAN)
        messages = [record.getMessage() for record in caplog.records if record.name == "peft_quant.optimizer_steps"]
        found = [re.search(r"optimizer step (\d+) .* skipped; (\d+) so far", message).groups() for message in messages]
        assert found == [("2", "1"), ("4", "2"), ("8", "4")]
        assert all(record.levelno == logging.WARNING for record in caplog.records)

    def test_in_a_row_end_training(self, peft_model, tmp_path):
        optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-4)
        for _ in range(MAX_SKIPPED_STEPS - 1):
            step(peft_model, optimizer, NAN)
        step(peft_model, optimizer)
        for _ in range(MAX_SKIPPED_STEPS - 1):
            step(peft_model, optimizer, NAN)
        before = contents(peft_model, optimizer)
        with pytest.raises(TrainingError, match=r"the last 10 optimizer steps, up to step 20 .* were not finite"):
            step(peft_model, optimizer, NAN)
        assert_equal(contents(peft_model, optimizer), before)
        peft_model.save_pretrained(tmp_path)


def test_layers_that_were_unloaded_are_freed():
    peft_model = get_peft_model(PlainMLP(), PEQAConfig())
    step(peft_model, torch.optim.SGD(trainable(peft_model), lr=1e-4))
    layer = weakref.ref(peft_model.base_model.model.up)
    model = peft_model.unload()
    del peft_model
    gc.collect()
    assert layer() is None
    assert model.up.scales.isfinite().all()


def test_fsdp2_skips_in_every_process(tmp_path):
    script = Path(__file__).parent / "tuners" / "sharded_steps.py"
    commands = [[sys.executable, script, str(rank), "2", tmp_path / "store"] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), outputs[0][1].decode() + outputs[1][1].decode()
