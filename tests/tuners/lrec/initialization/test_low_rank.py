"""Low-rank approximations against the textbook's form, with roots and inverses, and against brute force."""

import math

import pytest
import torch

from peft_quant.tuners.lrec.initialization.low_rank import DAMPINGS, low_rank, pick_damping, squared_error


SHAPES = [(24, 40), (40, 24), (32, 32)]


def error_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(features, tokens, seed=0):
    """Anisotropic: most of the energy lies in a few directions, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(99))
    spectrum = torch.logspace(1, -1.5, features)
    return torch.randn(tokens, features, generator=generator) * spectrum @ mix


def covariance(x):
    return x.t() @ x / len(x)


def naive(error, rank, covariance):
    """`svd_R(E C^1/2) C^-1/2`, for a regular covariance."""
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.sqrt() @ vectors.t()
    u, s, vt = torch.linalg.svd(error.double() @ root)
    return (u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(root)).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", (1, 5, 24))
def test_without_covariance_it_is_the_truncated_svd(shape, rank):
    error = error_of(shape)
    b, a = low_rank(error, rank)
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    assert b.dtype == a.dtype == torch.float32
    assert b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
    torch.testing.assert_close(b @ a, u[:, :rank] * s[:rank] @ vt[:rank], rtol=0, atol=1e-4)  # fp32 reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", (1, 5, 24))
def test_with_covariance_against_roots_and_inverses(shape, rank):
    error, c = error_of(shape), covariance(inputs(shape[1], 4096))
    b, a = low_rank(error, rank, c)
    reference = naive(error, rank, c)
    torch.testing.assert_close(b @ a, reference, rtol=0, atol=1e-4 * reference.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_no_search_finds_better(shape):
    error, x = error_of(shape), inputs(shape[1], 512)
    b, a = low_rank(error, 3, covariance(x))
    best = (x @ (error - b @ a).t()).square().sum()
    torch.manual_seed(1)
    found = [torch.randn(shape[0], 3).double(), torch.randn(3, shape[1]).double()]
    target = x.double() @ error.double().t()
    for _ in range(300):  # alternating least squares, each step exact
        hidden = x.double() @ found[1].t()
        found[0] = torch.linalg.lstsq(hidden, target).solution.t()
        left = torch.linalg.pinv(found[0])
        found[1] = left @ error.double()
    searched = (x.double() @ (error.double() - found[0] @ found[1]).t()).square().sum()
    assert searched >= best * (1 - 1e-5)
    assert searched <= best * 1.05  # the search came near, so it was a rival


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", (None, 10, 4096))
@pytest.mark.parametrize("damping", (0.0, 0.1))
def test_an_error_of_the_rank_is_recovered(shape, tokens, damping):
    error = error_of((shape[0], 4)) @ error_of((4, shape[1]), seed=1)
    c = None if tokens is None else covariance(inputs(shape[1], tokens))
    b, a = low_rank(error, 4, c, damping)
    torch.testing.assert_close(b @ a, error, rtol=0, atol=1e-4)


def test_factors_are_balanced():
    b, a = low_rank(error_of((24, 40)), 5, covariance(inputs(40, 4096)) * 1e6)
    torch.testing.assert_close(b.t() @ b, a @ a.t(), rtol=1e-4, atol=1e-4)


def test_damping_runs_from_the_covariance_to_the_plain_svd():
    error, c = error_of((24, 40)), covariance(inputs(40, 4096))
    plain = torch.matmul(*low_rank(error, 5))
    torch.testing.assert_close(torch.matmul(*low_rank(error, 5, c, 1e9)), plain, rtol=0, atol=1e-4)
    assert torch.equal(torch.matmul(*low_rank(error, 5, c, math.inf)), plain)
    weighted = [squared_error(error - torch.matmul(*low_rank(error, 5, c, damping)), c) for damping in DAMPINGS]
    assert weighted == sorted(weighted, reverse=True)
    assert weighted[-1] < 0.5 * weighted[0]


def test_directions_without_tokens_are_repaired_too():
    error, x = error_of((24, 40)), inputs(40, 10)
    b, a = low_rank(error, 5, covariance(x))
    values, vectors = torch.linalg.eigh(covariance(x).double())
    kept = values > values.max() * 1e-6
    roots = values.clamp(min=0).sqrt() * kept
    u, s, vt = torch.linalg.svd(error.double() @ (vectors * roots))
    inverse = torch.where(kept, 1 / roots, 0)
    by_pseudoinverse = (u[:, :5] * s[:5] @ vt[:5] * inverse @ vectors.t()).float()
    torch.testing.assert_close(x @ (b @ a).t(), x @ by_pseudoinverse.t(), rtol=0, atol=1e-2)
    assert (error - b @ a).norm() < (error - by_pseudoinverse).norm()


@pytest.mark.parametrize("tokens", (4, 40, 400, 4000))
@pytest.mark.parametrize("rank", (2, 8))
def test_the_damping_picked_is_the_best_on_held_out_tokens(tokens, rank):
    error, x, held_out = error_of((24, 40)), inputs(40, tokens), inputs(40, 200, seed=7)

    def held_out_error(damping):
        return squared_error(
            error - torch.matmul(*low_rank(error, rank, covariance(x), damping)), covariance(held_out)
        )

    picked = pick_damping(error, rank, covariance(x), covariance(held_out))
    errors = {damping: held_out_error(damping) for damping in DAMPINGS}
    assert errors[picked] <= min(errors.values()) * (1 + 1e-5)
    assert errors[picked] <= errors[math.inf]


def test_few_tokens_are_damped_and_many_trusted():
    error, generator = error_of((24, 40)), torch.Generator().manual_seed(3)
    spectrum = torch.linspace(0.5, 1.5, 40)
    few, many, held_out = (torch.randn(tokens, 40, generator=generator) * spectrum for tokens in (8, 100_000, 4000))
    assert pick_damping(error, 4, covariance(few), covariance(held_out)) >= 1
    assert pick_damping(error, 4, covariance(many), covariance(held_out)) <= 0.1


def test_isotropic_inputs_and_no_inputs_give_the_plain_svd():
    error = error_of((24, 40))
    assert pick_damping(error, 4, torch.eye(40), torch.eye(40)) == math.inf
    assert pick_damping(error, 4, torch.zeros(40, 40), torch.zeros(40, 40)) == math.inf
    plain = torch.matmul(*low_rank(error, 4))
    torch.testing.assert_close(torch.matmul(*low_rank(error, 4, torch.zeros(40, 40))), plain)


def test_squared_error_is_the_mean_over_tokens():
    error, x = error_of((24, 40)), inputs(40, 64)
    torch.testing.assert_close(
        torch.tensor(squared_error(error, covariance(x))).float(), (x @ error.t()).square().sum(1).mean()
    )
