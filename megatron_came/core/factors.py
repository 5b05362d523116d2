"""What a step computes from sums over elements: row and column statistics, and the clip divisor.

Means are taken over the full matrix, all ranks included, so that every function here is the
authors' arithmetic on vectors of statistics. Sums are float64; factors are fp32 (float64 for
float64 weights).
"""

import torch
from torch import Tensor

LEAST_RATIO, LEAST_RATIO_FLOAT64 = 2.0**-100, 2.0**-800
BAD_GUESS = 1024.0


def update_moment(moment: Tensor, sums: Tensor, *, count: int, eps: float, beta: float) -> None:
    """Exponential moving average of a mean, in place: r <- b r + (1-b) (sum/count + eps).

    Args:
        moment: row or column factor, (batch, n).
        sums: sums over the other axis, (batch, n), float64.
        count: number of elements in one such sum over the full matrix.
        eps: eps1 or eps2 of the paper.
        beta: beta2 or beta3.
    """
    moment.mul_(beta).add_(_mean(sums, count, eps, moment).to(moment.dtype), alpha=1.0 - beta)


def _mean(sums: Tensor, count: int, eps: float, moment: Tensor) -> Tensor:
    """Return sum/count + eps in float64; half of the moment's largest number, if that is less.

    So the moment of finite gradients is finite, whose squares may be beyond all numbers. What of a
    gradient is infinite shows in :func:`clip_divisor`.
    """
    return (sums / count).add_(eps).clamp_(max=largest_mean(moment.dtype))


def largest_mean(dtype: torch.dtype) -> float:
    """Return the largest mean square that counts as such, in a moment of this dtype."""
    return torch.finfo(dtype).max / 2


def mean_of(moment: Tensor) -> Tensor:
    """Return the mean over the last axis, also where the sum is beyond the largest number."""
    mean = moment.mean(-1, keepdim=True)
    return torch.where(mean.isinf(), (moment * 2.0**-64).mean(-1, keepdim=True) * 2.0**64, mean)


def scales(row: Tensor, column: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return (r/mean(r))^-1/2 and c^-1/2, whose outer product is 1/sqrt(r c/mean(r)).

    Never the product r c itself, which underflows in fp32 for small gradients. The ratio
    is at least 2^-100 in fp32: the scale of a row of which others are 10^15 times as large stays
    finite.

    Args:
        row: row factor, (batch, rows).
        column: column factor, (batch, columns).
        mean: mean(r) of the full matrix, (batch, 1); equal to mean(c).
    """
    least = LEAST_RATIO if row.dtype == torch.float32 else LEAST_RATIO_FLOAT64
    ratio = (row / mean).clamp_(min=least)
    return ratio.rsqrt_(), column.rsqrt()


def guessed_divisor(
    moment: Tensor, sums: Tensor, *, count: int, eps: float, clip_threshold: float
) -> Tensor:
    """Guess the clip divisor before u is known: d0, a scalar in the factor's dtype.

    With the other axis averaged out, u^2 of a row is about the row's mean of g^2 over its moving
    average. A good guess matters for the rounding of :func:`true_instability` only, whose error
    grows with (d/d0)^2.

    ``moment`` is a factor that this rank holds whole, already updated with these sums and the
    ``count`` and ``eps`` of :func:`update_moment`.
    """
    squared_rms = _mean(sums, count, eps, moment).div_(moment).mean()
    return (squared_rms.sqrt_() / clip_threshold).clamp_(min=1.0).to(moment.dtype)


def clip_divisor(total: Tensor, *, numel: int, clip_threshold: float) -> Tensor:
    """Return d = max(1, RMS(u) / threshold), a float64 scalar; NaN for an infinite gradient.

    ``total`` is the sum of u^2 over the full tensor of ``numel`` elements, a float64 scalar.
    """
    divisor = (total / numel).sqrt_().div_(clip_threshold).clamp_(min=1.0)
    return divisor + 0.0 * total


def true_instability(sums: Tensor, *, guess: Tensor, divisor: Tensor, beta1: float) -> Tensor:
    """Turn the sums of pass 2, made with the guess d0, into sums of (u^ - m)^2 with the true d.

    With e = u/d0 - m_old and delta = 1/d - 1/d0: u/d - m_new = b1 (e + delta u). Where a few huge
    elements make d more than ``BAD_GUESS`` times d0, that would be what is left of two large
    numbers: u/d is taken alone, beside which m_old is small in such a step.

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
    instability = (error + delta * (2.0 * cross + delta * square)).clamp_(min=0.0)
    is_bad = divisor > BAD_GUESS * guess.to(torch.float64)
    return torch.where(is_bad, square / divisor.square(), instability).mul_(beta1**2)
