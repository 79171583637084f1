"""The gradient stack: what it takes over, keeps and gives back."""

import math

import pytest
import torch
from torch import nn

from peft_quant.qft import GradientStack, Int8Weight


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 48), nn.LayerNorm(48), nn.Linear(48, 30, bias=False))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(Int8Weight.from_dense(layer.weight))
    return model


def backward(model, seed=0, scale=1.0):
    x = torch.randn(16, 70, generator=torch.Generator().manual_seed(seed))
    (model(x).square().sum() * scale).backward()


def dense_gradients(model, *seeds):
    for seed in seeds:
        backward(model, seed)
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad()
    return gradients


def attached(model, **options):
    stack = GradientStack(**options)
    stack.attach(model.parameters())
    return stack


def test_takes_every_gradient_in_int8(model):
    expected = dense_gradients(model, 0)
    stack = attached(model)
    backward(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(stack) == len(expected) == 5
    assert stack.bytes_held == sum(p.numel() + 4 * -(-p.numel() // 256) for p in model.parameters())
    while stack:
        parameter, gradient = stack.pop()
        dense = expected[parameter]
        assert (gradient.codes.dtype, gradient.codes.shape) == (torch.int8, parameter.shape)
        bound = gradient.scales.repeat_interleave(256)[: dense.numel()].view_as(dense)
        assert ((gradient.dequantize() - dense).abs() <= bound * (1 + 1e-4)).all()
        torch.testing.assert_close(gradient.square, dense.square().sum())


def test_only_one_dense_gradient_is_alive(model):
    alive = []

    def look(parameter):
        alive.append(sum(other.grad is not None for other in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    attached(model)
    backward(model)
    assert alive == [1] * 5


def test_the_last_one_comes_first(model):
    order = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(order.append)
    stack = attached(model)
    backward(model)
    assert [stack.pop()[0] for _ in range(5)] == order[::-1]
    with pytest.raises(KeyError):
        stack.pop()


def test_norm_is_the_dense_one(model):
    expected = dense_gradients(model, 0)
    stack = attached(model)
    assert stack.norm() == 0
    backward(model)
    torch.testing.assert_close(stack.norm(), nn.utils.get_total_norm(expected.values()))


def test_a_second_gradient_is_added_without_bias(model):
    expected = dense_gradients(model, 0, 1)
    sums, steps, repeats = dict.fromkeys(expected, 0), dict.fromkeys(expected, 0), 400
    for seed in range(repeats):
        stack = attached(model, seed=seed)
        backward(model, 0)
        backward(model, 1)
        assert len(stack) == 5
        norm = stack.norm()
        while stack:
            parameter, gradient = stack.pop()
            sums[parameter] = sums[parameter] + gradient.dequantize() / repeats
            steps[parameter] = max(steps[parameter], gradient.scales.max())
        stack.detach()
    for parameter, mean in sums.items():
        # rounded twice, with a deviation of at most half a step each: five standard errors
        bound = 5 * math.sqrt(2) * 0.5 * steps[parameter] / math.sqrt(repeats)
        assert (mean - expected[parameter]).abs().max() <= bound
    # the first gradients were rounded before the second ones were added
    torch.testing.assert_close(norm, nn.utils.get_total_norm(expected.values()), rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_one_gradient_that_is_not_finite_shows_in_the_norm(model, value):
    stack = attached(model)
    backward(model)
    backward(model, scale=value)
    backward(model)
    assert not stack.norm().isfinite()


def test_the_seed_and_the_step_decide(model):
    def codes(seed, steps):
        stack = attached(model, seed=seed)
        stack.steps = steps
        backward(model)
        found = []
        while stack:
            found.append(stack.pop()[1].codes.view(-1))
        stack.detach()
        return torch.cat(found)

    assert torch.equal(codes(0, 0), codes(0, 0))
    assert not torch.equal(codes(0, 0), codes(1, 0))
    assert not torch.equal(codes(0, 0), codes(0, 5))


def test_rounding_does_not_hang_on_the_order(model):
    gradients = dense_gradients(model, 0)
    found = []
    for order in (list(gradients), list(gradients)[::-1]):
        stack = attached(model)
        for parameter in order:
            stack.push(parameter, gradients[parameter])
            stack.push(parameter, gradients[parameter])
        entries = dict(stack.pop() for _ in order)
        found.append([entries[parameter].codes for parameter in gradients])
        stack.detach()
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_attaching_twice_is_once_and_detaching_gives_gradients_back(model):
    stack = attached(model)
    stack.attach(model.parameters())
    backward(model)
    assert len(stack) == 5
    stack.detach()
    assert not stack
    backward(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attaching_again_after_moving_the_model(model):
    stack = attached(model)
    model.double().float()
    stack.attach(model.parameters())
    backward(model)
    assert len(stack) == 5
    stack.detach()
    backward(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_parameters_are_left_alone(model):
    model[0].weight.requires_grad_(False)
    stack = attached(model)
    backward(model)
    assert len(stack) == 4 and model[0].weight not in stack and model[2].weight in stack


def test_gradients_can_go_to_a_function_instead(model):
    seen = {}
    stack = GradientStack(fused=lambda parameter, gradient: seen.update({parameter: gradient}))
    expected = dense_gradients(model, 0)
    stack.attach(model.parameters())
    backward(model)
    assert not stack
    assert all(torch.equal(seen[parameter], gradient) for parameter, gradient in expected.items())
    assert all(parameter.grad is None for parameter in model.parameters())
