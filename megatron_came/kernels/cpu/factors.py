"""Second moments, instabilities and their scales, from sums over rows and columns."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import math
from typing import Any, NamedTuple

import numpy as np

from megatron_came.kernels.cpu.compiling import (
    BAD_GUESS,
    LARGEST_MEAN,
    LEAST_RATIO,
    ONE,
    elementwise,
    fast,
    inline,
    serial,
)


class Axis(NamedTuple):
    """A factor of a batch of matrices, along rows or columns; of vectors, no rows."""

    moment: Any  # (batch, n), fp32
    sums: Any  # that update it, float64: (batch, n), or (3, batch, n) of e^2, u e and u^2
    scale: Any  # the moment's inverse roots, (batch, n), fp32
    full_length: int  # elements in such a sum, over the full matrix
    is_whole: bool  # whether this rank has all n of the full matrix


@inline
def _at_most(value, high):
    """``torch.clamp(max=high)``: NaN stays NaN."""
    return high if value > high else value


@inline
def _at_least(value, low):
    """``torch.clamp(min=low)``: NaN stays NaN."""
    return low if value < low else value


@fast
def _update_moment(moment, sums, count, eps, beta):
    """Twin of ``factors.update_moment``; returns the mean of the moment, and of mean/moment."""
    total, ratio = 0.0, 0.0
    keep, add = np.float32(beta), np.float32(1.0 - beta)
    for i in range(moment.size):
        mean = _at_most(sums[i] / count + eps, LARGEST_MEAN)
        moment[i] = keep * moment[i] + add * np.float32(mean)
        total += moment[i]
        ratio += mean / np.float64(moment[i])
    return total / moment.size, ratio / moment.size


@elementwise
def _update_scales(rows, columns, matrix, row_mean, column_mean):
    """Twin of ``factors.scales``."""
    mean = np.float32(row_mean if rows.is_whole else column_mean)
    moment, scale = rows.moment[matrix], rows.scale[matrix]
    for i in range(moment.size):
        scale[i] = ONE / math.sqrt(_at_least(moment[i] / mean, LEAST_RATIO))
    moment, scale = columns.moment[matrix], columns.scale[matrix]
    for i in range(moment.size):
        scale[i] = ONE / math.sqrt(moment[i])


@serial
def update_second_moments(rows, columns, inverse_guesses, eps, beta, clip_threshold):
    """Update r and c, each an ``Axis``, the scales of u, and the guesses of the clip divisor.

    ``eps`` is eps1, ``beta`` beta2; ``inverse_guesses``, out, has 1/d0 of each matrix, fp32.
    """
    for matrix in range(inverse_guesses.size):
        row_mean, row_ratio = _update_moment(
            rows.moment[matrix], rows.sums[matrix], rows.full_length, eps, beta
        )
        column_mean, column_ratio = _update_moment(
            columns.moment[matrix], columns.sums[matrix], columns.full_length, eps, beta
        )
        _update_scales(rows, columns, matrix, row_mean, column_mean)
        squared = 0.0
        if rows.is_whole:
            squared = _at_least(row_ratio, squared)
        if columns.is_whole:
            squared = _at_least(column_ratio, squared)
        guess = _at_least(math.sqrt(squared) / clip_threshold, 1.0)
        inverse_guesses[matrix] = np.float32(1.0 / guess)


@fast
def _update_instability(
    moment, sums, matrix, inverse_guess, inverse_divisor, beta1, count, eps, beta
):
    """Twin of ``factors.true_instability`` and ``update_moment``; returns the moment's mean."""
    errors, crosses, squares = sums[0, matrix], sums[1, matrix], sums[2, matrix]
    delta = inverse_divisor - inverse_guess
    is_bad = inverse_guess > BAD_GUESS * inverse_divisor
    total = 0.0
    keep, add = np.float32(beta), np.float32(1.0 - beta)
    for i in range(moment.size):
        instability = errors[i] + delta * (2.0 * crosses[i] + delta * squares[i])
        instability = _at_least(instability, 0.0)
        if is_bad:
            instability = squares[i] * inverse_divisor * inverse_divisor
        mean = _at_most(instability * beta1 * beta1 / count + eps, LARGEST_MEAN)
        moment[i] = keep * moment[i] + add * np.float32(mean)
        total += moment[i]
    return total / moment.size


@serial
def update_instabilities(rows, columns, inverse_guesses, inverse_divisor, eps, beta, beta1):
    """Update R and C, each an ``Axis``, and the scales of the confidence.

    ``eps`` is eps2, ``beta`` beta3, ``inverse_divisor`` 1/d; ``inverse_guesses`` has 1/d0 of each
    matrix, fp32.
    """
    for matrix in range(inverse_guesses.size):
        guess = np.float64(inverse_guesses[matrix])
        row_mean = _update_instability(
            rows.moment[matrix], rows.sums, matrix, guess, inverse_divisor, beta1,
            rows.full_length, eps, beta,
        )  # fmt: skip
        column_mean = _update_instability(
            columns.moment[matrix], columns.sums, matrix, guess, inverse_divisor, beta1,
            columns.full_length, eps, beta,
        )  # fmt: skip
        _update_scales(rows, columns, matrix, row_mean, column_mean)
