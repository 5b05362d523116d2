"""The three local passes of a step, each over one box of a slice.

A box is a contiguous (batch, rows, columns) tensor. ``row_scale`` (batch, rows) and
``column_scale`` (batch, columns) belong to the box; ``column_scale`` is None for vectors, which
have no columns. Sums over elements are added to float64 tensors, so that boxes and ranks may be
added in any order.
"""

import torch
from torch import Tensor

# Squares are summed of g * 2^-10: a row of gradients of 1e18 would overflow fp32, while a square
# so small that it loses bits to the scale is far below eps1.
SQUARE_SCALE = 2.0**-10
# Squares of u and e likewise: a gradient of 1e38, or a single one, makes them larger than 1e19.
UPDATE_SCALE = 2.0**-16


def add_squared_sums(grad: Tensor, row_sums: Tensor, column_sums: Tensor | None) -> None:
    """Pass 1: add the row and column sums of g^2, (batch, rows) and (batch, columns), in place.

    The gradient is fp32 or float64; a vector has no column sums.
    """
    squares = torch.mul(grad, SQUARE_SCALE).square_()
    row_sums.add_(squares.sum(-1), alpha=SQUARE_SCALE**-2)
    if column_sums is not None:
        column_sums.add_(squares.sum(-2), alpha=SQUARE_SCALE**-2)


def normalized(grad: Tensor, row_scale: Tensor, column_scale: Tensor | None) -> Tensor:
    """Return u = g / sqrt(r c / mean(r)) of a box, given the inverse roots of its factors."""
    update = grad * row_scale.unsqueeze(-1)
    return update if column_scale is None else update.mul_(column_scale.unsqueeze(-2))


def add_instability_sums(
    grad: Tensor,
    exp_avg: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    guess: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
) -> None:
    """Pass 2 of a matrix: add the sums of e^2, u e and u^2 with e = u/d0 - m, in place.

    ``exp_avg`` is the momentum m of the last step, like the gradient fp32 or float64; ``guess`` is
    d0, a scalar; the sums are (3, batch, rows) and (3, batch, columns).
    """
    update = normalized(grad, row_scale * UPDATE_SCALE, column_scale)
    error = torch.sub(update / guess, exp_avg, alpha=UPDATE_SCALE)
    product = torch.empty_like(error)
    for index, (left, right) in enumerate(((error, error), (update, error), (update, update))):
        torch.mul(left, right, out=product)
        row_sums[index].add_(product.sum(-1), alpha=UPDATE_SCALE**-2)
        column_sums[index].add_(product.sum(-2), alpha=UPDATE_SCALE**-2)


def add_squared_update(grad: Tensor, row_scale: Tensor, total: Tensor) -> None:
    """Pass 2 of a vector: add the sum of u^2 to the float64 scalar ``total``, in place."""
    update = normalized(grad, row_scale * UPDATE_SCALE, None)
    total.add_(update.square_().sum(), alpha=UPDATE_SCALE**-2)


def apply_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    row_confidence: Tensor | None,
    column_confidence: Tensor | None,
    *,
    divisor: Tensor,
    beta1: float,
    lr: float,
    weight_decay: float,
    cautious: bool,
) -> None:
    """Pass 3: update momentum and weights, both in place.

    m <- b1 m + (1-b1) u/d, p <- p (1 - lr wd) - lr m / sqrt(R C / mean(R)); paper, algorithm 2.

    Weights are of any floating dtype, the gradient in that of ``exp_avg``, the momentum. The scales
    are those of :func:`normalized`; the confidence, which vectors lack, is the inverse roots of the
    factors of the instability. ``divisor`` is d, a scalar. ``cautious`` leaves out of the last term
    what has another sign than ``grad``.
    """
    update = normalized(grad, row_scale * UPDATE_SCALE, column_scale)
    exp_avg.mul_(beta1).add_(update.div_(divisor * UPDATE_SCALE), alpha=1.0 - beta1)
    step = exp_avg
    if row_confidence is not None and column_confidence is not None:
        step = torch.mul(exp_avg, row_confidence.unsqueeze(-1), out=update)
        step.mul_(column_confidence.unsqueeze(-2))
    if cautious:  # by signs: their product underflows; multiplied, so that NaN stays NaN
        step = torch.mul(step, grad.sign() == exp_avg.sign(), out=update)
    if weight_decay != 0:
        param.add_(param, alpha=-lr * weight_decay)
    param.add_(step, alpha=-lr)
