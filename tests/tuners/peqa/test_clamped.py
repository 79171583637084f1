"""Scales that training drives to the limits of their dtype."""

import warnings

import pytest
import torch
from gptq_models import PlainMLP
from peft import get_peft_model

from peft_quant import PEQAConfig
from peft_quant.tuners.peqa.clamped import ClampedScales


@pytest.fixture(params=({}, {"signed": True}), ids=str)
def peft_model(request):
    return get_peft_model(PlainMLP(group_size=8, **request.param), PEQAConfig())


def scales(peft_model):
    return {
        name: (layer.base_scales.float(), layer.peqa_scales["default"])
        for name, layer in peft_model.base_model._adapted_layers().items()
    }


def clamp(peft_model, name, count, target=0.0):
    """Train so many scales of a layer, spread over it, to a multiple of their value."""
    base, delta = scales(peft_model)[name]
    with torch.no_grad():
        delta.view(-1)[: count * 7 : 7] = (base * (target - 1)).view(-1)[: count * 7 : 7]


def step(peft_model, learning_rate=1e-6):
    optimizer = torch.optim.SGD([delta for _, delta in scales(peft_model).values()], lr=learning_rate)
    optimizer.zero_grad()
    peft_model(torch.ones(3, 64)).pow(2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("target", (0.0, -5.0, 1e9))
def test_are_warned_of_after_the_step(peft_model, target):
    step(peft_model)
    clamp(peft_model, "down", 60, target)
    with pytest.warns(UserWarning, match=r"60 of 1,536 scales \(3.9%\) have reached .* 8% of those of down: the lear"):
        step(peft_model)


def test_are_warned_of_after_the_first_step(peft_model):
    with pytest.warns(UserWarning, match=r"of 1,536 scales .* the learning rate is too high"):
        step(peft_model, learning_rate=1e6)


def test_are_warned_of_again_when_their_number_has_doubled(peft_model):
    def warned(count):
        clamp(peft_model, "up", count)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(peft_model)
        return [str(warning.message).split(" scales")[0].split("step, ")[1] for warning in caught]

    found = [warned(count) for count in (0, 3, 20, 30, 50, 60, 109)]
    assert found == [[], [], ["20 of 1,536"], [], ["50 of 1,536"], [], ["109 of 1,536"]]


def test_are_looked_for_once_a_step(peft_model, monkeypatch):
    looks = []
    stock = ClampedScales.suspects
    monkeypatch.setattr(ClampedScales, "suspects", lambda monitor: looks.append(monitor) or stock(monitor))
    step(peft_model)
    optimizers = [torch.optim.SGD([delta], lr=1e-6) for _, delta in scales(peft_model).values()]
    looks.clear()
    peft_model(torch.ones(3, 64)).pow(2).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert len(looks) == 1


def test_that_began_there_do_not_count():
    model = PlainMLP(group_size=8)
    model.up.scales[:4] = 2.0**-24
    peft_model = get_peft_model(model, PEQAConfig())
    step(peft_model)
    _, delta = scales(peft_model)["up"]
    with torch.no_grad():
        delta[:4] = -1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(peft_model)
        peft_model.merge_adapter()


def test_of_active_adapters_together(peft_model):
    peft_model.add_adapter("other", PEQAConfig())
    for layer in peft_model.base_model._adapted_layers().values():
        with torch.no_grad():
            for delta in layer.peqa_scales.values():
                delta.copy_(layer.base_scales * -0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(peft_model)
    peft_model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match=r"1,536 of 1,536 scales"):
        step(peft_model)


def test_are_warned_of_when_merging(peft_model):
    clamp(peft_model, "down", 60)
    with pytest.warns(UserWarning, match=r"Merging an adapter of which 60 of 1,536 scales"):
        peft_model.merge_and_unload()
