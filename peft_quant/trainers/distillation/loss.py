"""KL divergence between a teacher's and a student's next-token distributions, with its gradient, in chunks of tokens.

Symbols: `M` tokens, `V` vocabulary size, `k` known entries of a teacher, `T` temperature.

    KL = T^2 * sum_v p_v * log(p_v / q_v),  p = softmax(teacher / T),  q = softmax(student / T)
    CE = -log softmax(student)[target]

A [`TopK`] teacher gives a set `K` of `k` entries and the mass of all others, which count as one entry:

    KL = T^2 * (sum_{v in K} p_v * log(p_v / q_v) + p_tail * log(p_tail / q_tail)),  q_tail = sum_{v not in K} q_v

Value and gradient equal the full KL of a teacher that distributes `p_tail` over the other entries as the student does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


IGNORED = -100
"""Target of tokens that are excluded from the loss, as in `torch.nn.functional.cross_entropy`."""

_CHUNK = 1 << 22  # logits


class TopK(NamedTuple):
    """A distribution given by its largest entries.

    Attributes:
        indices: token ids of the entries, integers `[M, k]`.
        log_probs: their log-probabilities and, in the last column, that of all other entries together, `[M, k + 1]`.
            Rows are normalized before use, so they may be rounded to 16 bits.
    """

    indices: torch.Tensor
    log_probs: torch.Tensor


class DistillationLoss(NamedTuple):
    """Sums over tokens as fp32 scalars; `loss = kl_weight * kl + ce_weight * ce`, and only `loss` has a gradient."""

    loss: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor


def distillation_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> DistillationLoss:
    """KL divergence from the teacher and cross entropy, summed over the tokens whose target is not `IGNORED`.

    Computed in fp32, a chunk of tokens at a time. If `logits` needs a gradient, **`logits` is overwritten** with it:
    no other tensor of that size is kept, and backward can run only once.

    Args:
        logits: the student's logits, `[..., V]`.
        targets: the next token at each position, integers `[...]`.
        teacher: logits of the same shape, or a [`TopK`] of `M` rows at the same temperature; with None, `kl` is 0.
        kl_weight: weight of KL in `loss`.
        ce_weight: weight of the cross entropy in `loss`.
        temperature: `T`, which applies to KL only.

    Raises:
        ValueError: the shapes do not match.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets {list(targets.shape)} do not fit logits {list(logits.shape)}.")
    rows = targets.numel()
    if isinstance(teacher, TopK):
        k = teacher.indices.shape[-1]
        if teacher.indices.shape != (rows, k) or teacher.log_probs.shape != (rows, k + 1):
            raise ValueError(
                f"A TopK of indices {list(teacher.indices.shape)} and log_probs {list(teacher.log_probs.shape)} does "
                f"not fit {rows} tokens: use [M, k] and [M, k + 1]."
            )
    elif teacher is not None:
        if teacher.shape != logits.shape:
            raise ValueError(f"The teacher's logits {list(teacher.shape)} do not fit {list(logits.shape)}.")
        teacher = teacher.reshape(rows, -1)
    if not torch.is_grad_enabled():
        logits = logits.detach()
    return DistillationLoss(
        *_DistillationLoss.apply(logits, targets.reshape(-1), teacher, kl_weight, ce_weight, temperature)
    )


def top_k(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The `k` largest entries of `softmax(logits / temperature)` for logits `[M, V]`, as int64 and fp32."""
    indices = torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(len(logits), k + 1, device=logits.device)
    for rows in _chunks(torch.arange(len(logits), device=logits.device), logits.shape[-1]):
        scores = torch.log_softmax(logits[rows].float() / temperature, -1)
        values, indices[rows] = scores.topk(k)
        rest = scores.scatter_(1, indices[rows], -torch.inf).logsumexp(-1, keepdim=True)
        log_probs[rows] = torch.cat([values, rest], 1)
    return TopK(indices, log_probs)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        teacher: torch.Tensor | TopK | None,
        kl_weight: float,
        ce_weight: float,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = logits.detach().reshape(len(targets), -1)
        differentiate = ctx.needs_input_grad[0]
        kl = torch.zeros((), device=z.device)
        ce = torch.zeros((), device=z.device)
        scored = (targets != IGNORED).nonzero().squeeze(1)
        if differentiate:
            z[targets == IGNORED] = 0
        for rows in _chunks(scored, z.shape[1]):
            scores = z[rows].float()
            target = targets[rows, None]
            log_q = log_q_at_1 = torch.log_softmax(scores, -1)
            ce -= log_q_at_1.gather(1, target).sum()
            grad = log_q_at_1.exp().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            grad *= ce_weight
            if teacher is not None:
                if temperature != 1:
                    log_q = torch.log_softmax(scores / temperature, -1)
                log_p = _log_p(teacher, rows, log_q, temperature)
                p = log_p.exp()
                # log_p may be infinite where p is 0
                kl += (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum() * temperature**2
                grad.add_(log_q.exp_().sub_(p), alpha=kl_weight * temperature)
            if differentiate:
                z[rows] = grad.to(z.dtype)
        if differentiate:
            ctx.save_for_backward(z)
            ctx.shape = logits.shape
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return saved.mul_(grad).view(ctx.shape), None, None, None, None, None


def _log_p(teacher: torch.Tensor | TopK, rows: torch.Tensor, log_q: torch.Tensor, temperature: float) -> torch.Tensor:
    """The teacher's log-probabilities at `rows`, `[m, V]`; the tail of a `TopK` is distributed as in `log_q`."""
    if not isinstance(teacher, TopK):
        return torch.log_softmax(teacher[rows].float() / temperature, -1)
    indices = teacher.indices[rows].long()
    known, tail = torch.log_softmax(teacher.log_probs[rows].float(), -1).split([indices.shape[1], 1], 1)
    log_p = log_q.scatter(1, indices, -torch.inf)
    log_p += tail - log_p.logsumexp(-1, keepdim=True)
    return log_p.scatter_(1, indices, known)


def _chunks(rows: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    return iter(rows.split(max(1, _CHUNK // width))) if len(rows) else iter(())
