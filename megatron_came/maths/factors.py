"""What a step computes from sums over elements: row and column statistics, and the clip divisor.

Means are taken over the full matrix, all ranks included, so that every function here is the
authors' arithmetic on vectors of statistics. Sums are float64; factors are fp32 (float64 for
float64 weights).
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_moment(moment: Tensor, sums: Tensor, *, count: int, eps: float, beta: float) -> None:
    """Exponential moving average of a mean, in place: r <- b r + (1-b) (sum/count + eps).

    Args:
        moment: row or column factor, (batch, n).
        sums: sums over the other axis, (batch, n), float64.
        count: number of elements in one such sum over the full matrix.
        eps: eps1 or eps2 of the paper.
        beta: beta2 or beta3.
    """
    mean = (sums / count).add_(eps)
    moment.mul_(beta).add_(mean.to(moment.dtype), alpha=1.0 - beta)


def scales(row: Tensor, column: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return (r/mean(r))^-1/2 and c^-1/2, whose outer product is 1/sqrt(r c/mean(r)).

    Never the product r c itself, which underflows in fp32 for small gradients.

    Args:
        row: row factor, (batch, rows).
        column: column factor, (batch, columns).
        mean: mean(r) of the full matrix, (batch, 1); equal to mean(c).
    """
    return (row / mean).rsqrt_(), column.rsqrt()


def guessed_divisor(
    moment: Tensor, sums: Tensor, *, count: int, eps: float, clip_threshold: float
) -> Tensor:
    """Guess the clip divisor before u is known, from one whole factor.

    With the other axis averaged out, u^2 of a row is about the row's mean of g^2 over its moving
    average. A good guess matters for the rounding of :func:`true_residuals` only, whose error
    grows with (d/d0)^2.

    Args:
        moment: a factor that this rank holds whole, already updated, (batch, n).
        sums: the sums that it was updated with.
        count: as in :func:`update_moment`.
        eps: eps1.
        clip_threshold: the paper's d.

    Returns:
        d0, a scalar in the factor's dtype.
    """
    mean = (sums / count).add_(eps)
    squared_rms = mean.div_(moment).mean()
    return (squared_rms.sqrt_() / clip_threshold).clamp_(min=1.0).to(moment.dtype)


def clip_divisor(total: Tensor, *, numel: int, clip_threshold: float) -> Tensor:
    """Return d = max(1, RMS(u) / threshold), a float64 scalar.

    Args:
        total: sum of u^2 over the full tensor, a float64 scalar.
        numel: number of elements of the full tensor.
        clip_threshold: the paper's d.
    """
    return (total / numel).sqrt_().div_(clip_threshold).clamp_(min=1.0)


def true_residuals(sums: Tensor, *, guess: Tensor, divisor: Tensor, beta1: float) -> Tensor:
    """Turn the sums of pass 2, made with the guess d0, into sums of (u^ - m)^2 with the true d.

    With e = u/d0 - m_old and delta = 1/d - 1/d0: u/d - m_new = b1 (e + delta u).

    Args:
        sums: sums of e^2, u e and u^2, (3, batch, n), float64.
        guess: d0.
        divisor: d.
        beta1: decay of the momentum.

    Returns:
        (batch, n), float64; never negative.
    """
    delta = divisor.reciprocal() - guess.to(torch.float64).reciprocal()
    error, cross, square = sums.unbind()
    return (error + delta * (2.0 * cross + delta * square)).clamp_(min=0.0).mul_(beta1**2)
