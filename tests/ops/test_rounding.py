import pytest
import torch

from peft_quant.ops import newly_clamped, reference, round_scales, round_scales_straight_through


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TUNED = torch.tensor([0.0123456, 1.0, 3e-5, -1.0, 0.0, -0.0, 1e-44, -1e-44, 1e38, -1e38])


def test_rounds_to_what_is_stored():
    scales = torch.tensor([0.0123456, 1.0, -3e-5])
    assert torch.equal(round_scales(scales, scales, torch.float16), scales.half())
    assert torch.equal(round_scales(scales, scales, torch.float32), scales)


@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("storage", DTYPES)
def test_equals_the_formula(storage, sign):
    base = torch.full_like(TUNED, 0.01 * sign).to(storage)
    stored = round_scales(TUNED, base, storage)
    assert stored.dtype == storage
    assert torch.equal(stored, reference.round_scales(TUNED, base, storage))


@pytest.mark.parametrize("serving", (None, *DTYPES))
@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("storage", DTYPES)
def test_no_scale_crosses_zero_or_becomes_infinite(storage, sign, serving):
    base = torch.full_like(TUNED, 0.01 * sign)
    stored = round_scales(TUNED, base, storage, serving)
    assert torch.equal(stored.sign().float(), base.sign())
    assert torch.isfinite(stored).all()


def test_a_scale_that_would_cross_zero_becomes_the_one_beside_it():
    base = torch.tensor([0.5, -0.5])
    assert round_scales(-base, base, torch.float16).tolist() == [2.0**-24, -(2.0**-24)]


def test_mirrored_scales_round_to_mirrored_ones():
    scales = torch.rand(1000) * 0.1 + 1e-3
    stored = round_scales(scales, scales, torch.float16, torch.bfloat16)
    assert torch.equal(round_scales(-scales, -scales, torch.float16, torch.bfloat16), -stored)


def test_serving_in_bf16_changes_nothing_any_more():
    scales = torch.rand(1000) * 0.1 + 1e-3
    stored = round_scales(scales, scales, torch.float16, torch.bfloat16)
    assert torch.equal(stored.bfloat16().half(), stored)
    in_fp16 = round_scales(scales, scales, torch.float16)
    assert not torch.equal(in_fp16.bfloat16().half(), in_fp16)


def test_nan_is_not_hidden():
    assert torch.isnan(round_scales(torch.full((2,), torch.nan), torch.tensor([1.0, -1.0]), torch.float16)).all()


def test_the_gradient_passes_straight_through():
    scales = torch.tensor([0.0123456, -1.0, -1.0], requires_grad=True)
    base = torch.tensor([0.01, 0.01, -0.01], requires_grad=True)
    round_scales_straight_through(scales, base, torch.float16).backward(torch.tensor([2.0, 3.0, 4.0]))
    assert scales.grad.tolist() == [2.0, 3.0, 4.0]
    assert base.grad is None


@pytest.mark.parametrize("serving", (None, torch.bfloat16))
@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("storage", DTYPES)
def test_scales_that_are_clamped(storage, sign, serving):
    info = torch.finfo(storage)
    smallest, largest = info.tiny * info.eps, info.max
    rows = [
        # base, tuned, clamped
        (0.01, 0.02, False),
        (0.01, 1e-4, False),
        (0.01, 0.0, True),
        (0.01, -3.0, True),
        (0.01, float("inf"), True),
        (smallest, -1.0, False),
        (largest, float("inf"), False),
    ]
    base, tuned, clamped = (torch.tensor(column) for column in zip(*rows))
    assert torch.equal(newly_clamped(tuned * sign, (base * sign).to(storage), storage, serving), clamped)
