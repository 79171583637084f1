"""The distillation loss against the formula on whole logits, and the memory it takes."""

import pytest
import torch
from gptq_models import peak_bytes
from torch.nn import functional

from peft_quant.trainers.distillation.loss import IGNORED, TopK, distillation_loss, top_k


def case(rows=7, vocabulary=37, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), targets


def naive(student, teacher, targets, kl_weight=1.0, ce_weight=0.0, temperature=1.0):
    """In fp64, from the definition; a `TopK` by merging the student's other entries into one."""
    scored = targets != IGNORED
    student = student.double()
    q = torch.softmax(student / temperature, -1)
    if isinstance(teacher, TopK):
        p = torch.softmax(teacher.log_probs.double(), -1)
        known = q.gather(1, teacher.indices.long())
        q = torch.cat([known, q.scatter(1, teacher.indices.long(), 0).sum(-1, keepdim=True)], 1)
    else:
        p = torch.softmax(teacher.double() / temperature, -1)
    kl = (torch.xlogy(p, p) - torch.where(p > 0, p * q.log(), 0))[scored].sum() * temperature**2
    ce = functional.cross_entropy(student, targets, reduction="sum", ignore_index=IGNORED)
    return kl_weight * kl + ce_weight * ce, kl, ce


def both(student, teacher, targets, **options):
    """Loss, KL, CE and gradient of a scaled loss: as implemented, and naive."""
    expected = naive(student, teacher, targets, **options)
    (expected_grad,) = torch.autograd.grad(expected[0] / 5, student)
    leaf = student.detach().clone().requires_grad_()
    actual = distillation_loss(leaf * 1, targets, teacher, **options)  # a copy, which is overwritten
    (actual_grad,) = torch.autograd.grad(actual.loss / 5, leaf)
    return (*actual, actual_grad), (*(value.float() for value in expected), expected_grad)


OPTIONS = (
    {},
    {"kl_weight": 0.3, "ce_weight": 2.0},
    {"kl_weight": 0.0, "ce_weight": 1.0},
    {"temperature": 2.5},
    {"temperature": 0.7, "kl_weight": 2.0, "ce_weight": 0.1},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", (None, 1, 5, 36, 37))
@pytest.mark.parametrize("chunk_rows", (1, 2, 3, 7, 8))
def test_value_and_gradient_at_every_chunking(monkeypatch, options, k, chunk_rows):
    monkeypatch.setattr("peft_quant.trainers.distillation.loss._CHUNK", chunk_rows * 37 + 5)
    student, teacher, targets = case()
    targets[[0, 3, 6]] = IGNORED
    if k is not None:
        teacher = top_k(teacher, k, options.get("temperature", 1.0))
    for actual, expected in zip(*both(student, teacher, targets, **options)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_all_entries_are_the_full_distribution(temperature):
    student, teacher, targets = case()
    options = {"temperature": temperature, "ce_weight": 0.5}
    whole, _ = both(student, teacher, targets, **options)
    entries, _ = both(student, top_k(teacher, 37, temperature), targets, **options)
    for actual, expected in zip(entries, whole):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_more_entries_come_closer_from_below():
    student, teacher, targets = case()
    kl = [distillation_loss(student.detach(), targets, top_k(teacher, k)).kl.item() for k in (1, 2, 4, 8, 16, 37)]
    assert kl == sorted(kl)  # merging entries never makes distributions further apart
    assert kl[0] < 0.9 * kl[-1]


@pytest.mark.parametrize("indices", (torch.uint16, torch.int32))
def test_entries_in_16_bits(indices):
    student, teacher, targets = case()
    entries = top_k(teacher, 8)
    stored = TopK(entries.indices.to(indices), entries.log_probs.half())
    expected, _ = both(student, entries, targets)
    actual, _ = both(student, stored, targets)
    # a logarithm of up to 16 is off by 2 ** -8 at most in fp16, and so is its probability, relatively
    torch.testing.assert_close(actual[1], expected[1], rtol=2**-8, atol=0)
    torch.testing.assert_close(actual[3], expected[3], rtol=0, atol=2**-8)


def test_a_tail_below_every_float_is_no_tail():
    student = torch.tensor([[1.0, 2.0, -300.0, -300.0]])
    teacher = torch.tensor([[1.0, 1.0, -300.0, -310.0]])
    targets = torch.tensor([0])
    for k in (2, 3):
        entries = top_k(teacher, k)
        loss = distillation_loss(student, targets, TopK(entries.indices, entries.log_probs.half()))
        torch.testing.assert_close(loss.kl, distillation_loss(student, targets, teacher).kl, rtol=1e-3, atol=0)


def test_gradients_of_a_tail_near_zero_are_exact():
    """`1 - sum(q)` would be rounding noise: both tails are about 1e-9, the student's ten times larger."""
    teacher = torch.tensor([[20.0, 0.0, -1.0, -1.0]])
    student = torch.tensor([[20.0, 2.3, 1.3, 1.3]], requires_grad=True)
    actual, expected = both(student, top_k(teacher, 1), torch.tensor([0]))
    assert 0 < expected[1] < 1e-7
    torch.testing.assert_close(actual[3][:, 1:], expected[3][:, 1:], rtol=1e-3, atol=0)


def test_impossible_entries_of_both():
    student, teacher, targets = case()
    student = student.detach()
    allowed = torch.arange(37) < 30
    expected = distillation_loss(student[:, :30], targets.clamp(max=29), teacher[:, :30])
    masked = [logits.masked_fill(~allowed, -torch.inf) for logits in (student, teacher)]
    actual = distillation_loss(masked[0], targets.clamp(max=29), masked[1])
    torch.testing.assert_close(actual.kl, expected.kl)


def test_ignored_tokens_count_for_nothing_even_if_not_numbers():
    student, teacher, targets = case()
    targets[2:5] = IGNORED
    kept = torch.tensor([0, 1, 5, 6])
    expected = both(student[kept].detach().requires_grad_(), teacher[kept], targets[kept], ce_weight=1.0)[0]
    broken, teacher = student.detach().clone(), teacher.clone()
    broken[2:5] = teacher[2:5] = torch.nan
    leaf = broken.requires_grad_()
    actual = distillation_loss(leaf * 1, targets, teacher, ce_weight=1.0)
    (grad,) = torch.autograd.grad(actual.loss / 5, leaf)
    torch.testing.assert_close(tuple(actual), expected[:3])
    torch.testing.assert_close(grad[kept], expected[3])
    assert not grad[2:5].any()


def test_nothing_to_count():
    student, teacher, targets = case()
    leaf = student.detach().requires_grad_()
    loss = distillation_loss(leaf * 1, torch.full_like(targets, IGNORED), teacher, ce_weight=1.0)
    assert [value.item() for value in loss] == [0, 0, 0]
    assert not torch.autograd.grad(loss.loss, leaf)[0].any()


def test_without_a_teacher():
    student, _, targets = case()
    loss = distillation_loss(student.detach(), targets, None, ce_weight=2.0)
    torch.testing.assert_close(loss.ce, functional.cross_entropy(student, targets, reduction="sum").detach())
    assert loss.kl == 0
    assert loss.loss == 2 * loss.ce


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_logits_in_16_bits(dtype):
    student, teacher, targets = case(dtype=dtype)
    leading = student.detach().reshape(7, 1, 37).expand(7, 2, 37).clone().requires_grad_()
    loss = distillation_loss(
        leading * 1, targets[:, None].expand(7, 2), teacher[:, None].expand(7, 2, 37), ce_weight=1.0
    )
    (grad,) = torch.autograd.grad(loss.loss, leading)
    expected, expected_kl, _ = naive(student, teacher, targets, ce_weight=1.0)
    (expected_grad,) = torch.autograd.grad(expected, student)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.kl / 2, expected_kl.float())
    # rounded once to the dtype of the logits; so is the expected gradient
    torch.testing.assert_close(grad[:, 1], expected_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_logits_without_gradient_are_left_alone():
    student, teacher, targets = case()
    before = student.detach().clone()
    with torch.no_grad():
        distillation_loss(student, targets, teacher)
    distillation_loss(student.detach(), targets, teacher)
    assert torch.equal(student, before)


def test_a_second_backward_is_an_error():
    student, teacher, targets = case()
    loss = distillation_loss(student * 1, targets, teacher).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shapes_that_do_not_fit():
    student, teacher, targets = case()
    with pytest.raises(ValueError, match=r"targets \[6\] do not fit logits \[7, 37\]"):
        distillation_loss(student, targets[1:], teacher)
    with pytest.raises(ValueError, match=r"teacher's logits \[7, 36\] do not fit \[7, 37\]"):
        distillation_loss(student, targets, teacher[:, 1:])
    entries = top_k(teacher, 3)
    with pytest.raises(ValueError, match=r"indices \[7, 3\] and log_probs \[7, 3\] does not fit 7 tokens"):
        distillation_loss(student, targets, TopK(entries.indices, entries.log_probs[:, 1:]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("k", (None, 16))
def test_memory_is_chunks_beside_the_logits(monkeypatch, dtype, k):
    rows, vocabulary = 512, 2048
    monkeypatch.setattr("peft_quant.trainers.distillation.loss._CHUNK", 16 * vocabulary)
    student, teacher, targets = case(rows, vocabulary, dtype=dtype)
    logits = student * 1
    teacher = teacher if k is None else top_k(teacher, k)
    whole = rows * vocabulary * 4
    chunk = 16 * vocabulary * 4

    def ours():
        loss = distillation_loss(logits, targets, teacher, ce_weight=1.0, temperature=2.0).loss
        torch.autograd.grad(loss, logits)

    def naive_in_fp32():
        scores = student.detach().float().requires_grad_()
        functional.kl_div(scores.log_softmax(-1), scores.detach().softmax(-1), reduction="sum").backward()

    assert peak_bytes(naive_in_fp32) > 2 * whole  # the measure sees what is there
    assert peak_bytes(ours) < 10 * chunk < whole / 3
