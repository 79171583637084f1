import gc

import pytest
import torch
from gptq_models import PlainMLP
from peft import get_peft_model

from peft_quant import LRECConfig, PEQAConfig, TrainingError
from peft_quant.optimizer_steps import _watched


@pytest.fixture
def peft_model():
    return get_peft_model(PlainMLP(), PEQAConfig())


def backward(peft_model):
    peft_model(torch.randn(3, 64)).pow(2).sum().backward()


def pending():
    gc.collect()
    return sum(watched.first is not None for watched in _watched.values())


def trainable(peft_model):
    return [p for p in peft_model.parameters() if p.requires_grad]


def test_a_step_that_trains_is_proof_and_ends_it():
    before = pending()
    peft_model = get_peft_model(PlainMLP(), PEQAConfig())
    assert pending() == before + 1
    optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-4)
    backward(peft_model)
    optimizer.step()
    assert pending() == before
    optimizer.zero_grad()
    optimizer.step()


def test_an_optimizer_without_gradients_is_noticed(peft_model):
    optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-4)
    with pytest.raises(TrainingError, match="none of the 2 adapter tensors has moved"):
        optimizer.step()


class TestBatchesWithoutLabels:
    def step(self, peft_model, optimizer, scale):
        optimizer.zero_grad()
        (peft_model(torch.randn(3, 64)).pow(2).sum() * scale).backward()
        optimizer.step()

    def test_the_first_one_is_noticed_and_no_proof(self, peft_model):
        before = pending()
        optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-4)
        with pytest.warns(UserWarning, match="every label of its batch is -100"):
            self.step(peft_model, optimizer, 0.0)
        assert pending() == before
        self.step(peft_model, optimizer, 1.0)
        assert pending() == before - 1

    @pytest.mark.filterwarnings("ignore:All gradients")
    def test_nothing_else_is_an_error(self, peft_model):
        optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-4)
        for _ in range(9):
            self.step(peft_model, optimizer, 0.0)
        with pytest.raises(TrainingError, match=r"zero in each of the first 10 .* every label is -100"):
            self.step(peft_model, optimizer, 0.0)


def test_an_optimizer_of_the_base_parameters_is_noticed(peft_model):
    head = peft_model.base_model.model.head.weight
    head.grad = torch.ones_like(head)
    with pytest.raises(TrainingError, match=r"changed 1 tensors that are frozen, first head\.weight"):
        torch.optim.SGD([head, *trainable(peft_model)], lr=0.1).step()


def test_an_optimizer_that_changes_packed_tensors_is_noticed(peft_model):
    class Damaging(torch.optim.SGD):
        def step(self):
            peft_model.base_model.model.up.base_layer.qweight += 1

    optimizer = Damaging(trainable(peft_model), lr=0.1)
    with pytest.raises(TrainingError, match=r"first up\.qweight"):
        optimizer.step()


def test_warmup_from_zero_waits_for_the_first_real_step(peft_model):
    optimizer = torch.optim.AdamW(trainable(peft_model), lr=0.0)
    backward(peft_model)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()


def test_a_step_that_a_gradient_scaler_skips_is_no_proof(peft_model):
    optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(peft_model(torch.randn(3, 64)).pow(2).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(parameter.any() for parameter in trainable(peft_model))


def test_other_models_are_none_of_its_business(peft_model):
    other = torch.nn.Linear(2, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    before = pending()
    optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-4)
    backward(peft_model)
    optimizer.step()
    assert pending() == before - 1


def test_each_of_several_models_is_proven():
    models = [get_peft_model(PlainMLP(), config) for config in (PEQAConfig(), LRECConfig(), PEQAConfig())]
    before = pending()
    for i, peft_model in enumerate(models):
        optimizer = torch.optim.SGD(trainable(peft_model), lr=1e-4)
        if i < 2:
            backward(peft_model)
            optimizer.step()
            assert pending() == before - i - 1
        else:
            with pytest.raises(TrainingError, match="none of the 2 adapter tensors"):
                optimizer.step()


def test_a_model_that_is_never_trained_leaves_nothing_behind():
    before = pending()
    peft_model = get_peft_model(PlainMLP(), PEQAConfig())
    del peft_model
    assert pending() == before


def test_a_second_adapter_is_under_proof_too():
    before = pending()
    peft_model = get_peft_model(PlainMLP(), PEQAConfig(inference_mode=True))
    peft_model.add_adapter("second", PEQAConfig())
    assert pending() == before + 1
    peft_model.set_adapter("second")
    with pytest.raises(TrainingError, match="none of the 2 adapter tensors"):
        torch.optim.AdamW(trainable(peft_model), lr=1e-4).step()


def test_inference_needs_no_proof():
    before = pending()
    peft_model = get_peft_model(PlainMLP(), PEQAConfig(inference_mode=True))
    assert pending() == before
    del peft_model


class TestLREC:
    def test_a_first_step_that_moves_b_alone_is_proof(self):
        peft_model = get_peft_model(PlainMLP(), LRECConfig())
        layer = peft_model.base_model.model.up
        before = layer.lora_A["default"].weight.detach().clone()
        optimizer = torch.optim.SGD(trainable(peft_model), lr=1e-3)
        backward(peft_model)
        optimizer.step()
        assert torch.equal(layer.lora_A["default"].weight, before)
        assert layer.lora_B["default"].weight.any()

    def test_weight_decay_of_a_is_none(self):
        peft_model = get_peft_model(PlainMLP(), LRECConfig())
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(trainable(peft_model), lr=1e-3, weight_decay=0.1)
        with pytest.raises(TrainingError, match="none of the 2 adapter tensors has moved"):
            optimizer.step()
