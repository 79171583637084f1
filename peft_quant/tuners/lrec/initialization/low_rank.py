"""The best low-rank approximations of a quantization error `E = W_float - W_dequantized`, `[N, K]`, in closed form.

For inputs `x` with covariance `C = mean(x x^T)`, `[K, K]`, the layer's mean squared output error after adding an
adapter `B A` of rank `R` is

    mean |(E - B A) x|^2 = tr((E - B A) C (E - B A)^T)

With `C = S S^T` this is the Frobenius norm of `E S - B A S`, minimal where `B A S` is the truncated singular value
decomposition of `E S` (Eckart and Young, 1936). Let `U`, `[N, R]`, be the leading left singular vectors of `E S`,
which are the leading eigenvectors of `E C E^T`. The truncation is `U U^T E S`, so

    B A = U U^T E

is a minimum: no root or inverse of `C` is needed, and `C` may be singular. Without a covariance (`C = I`) it is the
best approximation of `E` itself. If `C` is regular, it is the exact form of QERA (Zhang et al., 2024, arXiv
2410.06040) and of EoRA (Liu et al., 2024, arXiv 2410.21271). If `C` is singular, as with fewer tokens than
in-features, their solution by pseudoinverse is zero on inputs that calibration lacked; this one is the nearest to `E`
there, among all minima with its column space.

Few tokens also make `C` noisy, and `U` then fits the noise. Damping adds a multiple of the identity:

    C_d = C + d * tr(C) / K * I

`d = 0` trusts the covariance and `d = inf` is the plain singular value decomposition. [`pick_damping`] chooses `d` by
the error on held-out tokens.

Arithmetic is in fp64: eigenvectors of `E C E^T` square the condition number of `E S`.
"""

from __future__ import annotations

import math

import torch


DAMPINGS = (math.inf, 10.0, 1.0, 0.1, 0.01, 0.0)
"""Candidate strengths, the plain singular value decomposition first."""

_ROUNDING = 1e-9


def low_rank(
    error: torch.Tensor, rank: int, covariance: torch.Tensor | None = None, damping: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best approximation of `error` of the given rank, balanced so that `B^T B = A A^T`.

    Args:
        error: floating point `[N, K]`.
        rank: `R`, at most `min(N, K)`.
        covariance: `C`, floating point `[K, K]`, of the inputs whose error is to be small; the identity by default.
        damping: `d`, relative to the mean of the diagonal of `C`; infinite for the identity.

    Returns:
        `B`, fp32 `[N, R]`, and `A`, fp32 `[R, K]`.
    """
    basis, reduced = _reduce(error)
    left = _leading_vectors(*_grams(reduced, covariance), rank, damping)
    right = left.t() @ reduced
    # `left` is orthonormal: the singular value decomposition of `right` gives that of the product
    u, s, vt = torch.linalg.svd(right, full_matrices=False)
    left, root = left @ u, s.sqrt()
    if basis is not None:
        left = basis @ left
    return (left * root).float(), (root[:, None] * vt).float()


def pick_damping(error: torch.Tensor, rank: int, fit: torch.Tensor, held_out: torch.Tensor) -> float:
    """The damping in [`DAMPINGS`] for which [`low_rank`] on `fit` minimizes the error on `held_out`.

    By that measure it is never worse than the plain singular value decomposition, which is the first candidate.

    Args:
        error: floating point `[N, K]`.
        rank: `R`.
        fit: covariance `[K, K]` of some tokens.
        held_out: covariance `[K, K]` of others.
    """
    _, reduced = _reduce(error)
    target = reduced @ held_out.double() @ reduced.t()
    best, most_explained = math.inf, -math.inf
    grams = _grams(reduced, fit)
    for damping in DAMPINGS:
        left = _leading_vectors(*grams, rank, damping)
        # the remaining error is tr(target) minus this
        explained = float((left * (target @ left)).sum())
        if explained > most_explained * (1 + _ROUNDING):
            best, most_explained = damping, explained
    return best


def squared_error(error: torch.Tensor, covariance: torch.Tensor) -> float:
    """`tr(E C E^T)`, the mean squared output error on inputs with covariance `C`."""
    error = error.float()
    return float(((error @ covariance.float()) * error).sum(dtype=torch.float64))


def _reduce(error: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """An orthonormal basis of the columns of a tall `error`, and `error` in that basis.

    This limits eigenproblems to `K` dimensions.
    """
    error = error.double()
    if error.shape[0] <= error.shape[1]:
        return None, error
    basis, reduced = torch.linalg.qr(error)
    return basis, reduced


def _grams(error: torch.Tensor, covariance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`E E^T`, and `E C E^T` for `C` scaled to a mean of 1 on its diagonal; None without `C`, or if it is 0."""
    gram = error @ error.t()
    mean = 0.0 if covariance is None else float(covariance.diagonal().double().mean())
    if covariance is None or mean == 0:
        return gram, None
    return gram, error @ (covariance.double() / mean) @ error.t()


def _leading_vectors(gram: torch.Tensor, weighted: torch.Tensor | None, rank: int, damping: float) -> torch.Tensor:
    """Leading eigenvectors of `E C_d E^T`, as columns."""
    damped = gram if weighted is None or math.isinf(damping) else weighted + damping * gram
    return torch.linalg.eigh(damped).eigenvectors[:, -rank:]
