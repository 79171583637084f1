"""Models with int8 weights under torch.compile: no graph breaks, the same gradients, the weights decoded again."""

import pytest
import torch
from gptq_models import float_llama
from torch import nn

from peft_quant.qft import Int8Weight, QuantizedLion


@pytest.fixture(autouse=True)
def dynamo():
    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def int8_llama(dtype=torch.float32):
    model = float_llama().train().to(dtype)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight.from_dense(module.weight))
    return model


def loss(function, seed=0):
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(seed))
    return function(input_ids=ids, labels=ids).loss


def gradients(model, function):
    model.zero_grad()
    loss(function).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_decoder_has_no_graph_breaks(backend, checkpointing):
    model = int8_llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(model, model)
    actual = gradients(model, torch.compile(model, backend=backend, fullgraph=True))
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", (False, True))
def test_trains(fused):
    outcomes = []
    for compiled in (False, True):
        model = int8_llama()
        function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = QuantizedLion(model.parameters(), lr=1e-3, fused=fused)
        losses = []
        for step in range(4):
            value = loss(function, step)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        outcomes.append(losses)
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


def test_one_graph_serves_weights_that_change():
    model = int8_llama()
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(model, backend=counter)
    optimizer = QuantizedLion(model.parameters(), lr=1e-3, refresh_steps=1)
    for step in range(3):
        loss(function, step).backward()
        optimizer.step()
    assert counter.frame_count == 1
