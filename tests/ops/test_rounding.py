import pytest
import torch

from peft_quant.ops import round_scales, round_scales_straight_through


def test_rounds_to_what_is_stored():
    scales = torch.tensor([0.0123456, 1.0, 3e-5])
    assert torch.equal(round_scales(scales, torch.float16), scales.half())
    assert torch.equal(round_scales(scales, torch.float32), scales)


def test_serving_in_bf16_changes_nothing_any_more():
    scales = torch.rand(1000) * 0.1 + 1e-3
    stored = round_scales(scales, torch.float16, torch.bfloat16)
    assert torch.equal(stored.bfloat16().half(), stored)
    assert not torch.equal(round_scales(scales, torch.float16).bfloat16().half(), round_scales(scales, torch.float16))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_scales_stay_positive_and_finite(dtype):
    stored = round_scales(torch.tensor([-1.0, 0.0, 1e-44, 1e38]), dtype)
    assert (stored > 0).all()
    assert torch.isfinite(stored).all()


def test_nan_is_not_hidden():
    assert torch.isnan(round_scales(torch.tensor([float("nan")]), torch.float16)).all()


def test_the_gradient_passes_straight_through():
    scales = torch.tensor([0.0123456, -1.0], requires_grad=True)
    round_scales_straight_through(scales, torch.float16).backward(torch.tensor([2.0, 3.0]))
    assert scales.grad.tolist() == [2.0, 3.0]
