"""Second moments, instabilities and clip divisors of matrices, from the sums of their storage."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import math

import numpy as np

from megatron_came.kernels.cpu.compiling import (
    BAD_GUESS,
    LARGEST_MEAN,
    LEAST_RATIO,
    ONE,
    at_least,
    at_most,
    doubles,
    elementwise,
    fast,
    floats,
    inline,
)
from megatron_came.kernels.triton.tables import GroupField as Group
from megatron_came.kernels.triton.tables import MatrixField as Matrix


@fast
def update_moment(moment, sums, count, eps, beta):
    """Twin of ``factors.update_moment``; returns the sum of the moment, and of the mean over it."""
    total, ratio = 0.0, 0.0
    keep, add = np.float32(beta), np.float32(1.0 - beta)
    for i in range(moment.size):
        mean = at_most(sums[i] / count + eps, LARGEST_MEAN)
        moment[i] = keep * moment[i] + add * np.float32(mean)
        total += moment[i]
        ratio += mean / np.float64(moment[i])
    return total, ratio


@elementwise
def _inverse_roots(moment, out):
    for i in range(moment.size):
        out[i] = ONE / math.sqrt(moment[i])


@elementwise
def _inverse_root_ratios(moment, mean, out):
    for i in range(moment.size):
        out[i] = ONE / math.sqrt(at_least(moment[i] / mean, LEAST_RATIO))


@inline
def _mean(param, row_total, column_total):
    """mean(r) = mean(c) of the full matrix, from the factor that this rank holds whole."""
    if param[Matrix.ROWS_ARE_WHOLE]:
        return np.float32(row_total / param[Matrix.ROWS])
    return np.float32(column_total / param[Matrix.COLUMNS])


@inline
def update_second_moments(first, stop, matrices, factors, groups, divisors):
    """Twin of ``factors.update_moment``, ``scales`` and ``guessed_divisor`` (of each matrix).

    Args:
        first: row of ``factors``.
        stop: one past the last row.
        matrices: table of ``MatrixField``.
        factors: (matrices, 2): matrix parameter, place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32, out: 1/d0.
    """
    for index in range(first, stop):
        param, matrix = matrices[factors[index, 0]], factors[index, 1]
        group = groups[param[Matrix.GROUP]]
        rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
        row = floats(param[Matrix.ROW] + 4 * matrix * rows, rows)
        column = floats(param[Matrix.COLUMN] + 4 * matrix * columns, columns)
        eps, beta = group[Group.EPS1], group[Group.BETA2]
        row_total, row_ratio = update_moment(
            row,
            doubles(param[Matrix.SQUARE_ROWS] + 8 * matrix * rows, rows),
            param[Matrix.FULL_COLUMNS],
            eps,
            beta,
        )
        column_total, column_ratio = update_moment(
            column,
            doubles(param[Matrix.SQUARE_COLUMNS] + 8 * matrix * columns, columns),
            param[Matrix.FULL_ROWS],
            eps,
            beta,
        )
        mean = _mean(param, row_total, column_total)
        _inverse_root_ratios(row, mean, floats(param[Matrix.ROW_SCALE] + 4 * matrix * rows, rows))
        _inverse_roots(column, floats(param[Matrix.COLUMN_SCALE] + 4 * matrix * columns, columns))
        squared = 0.0
        if param[Matrix.ROWS_ARE_WHOLE]:
            squared = at_least(row_ratio / rows, squared)
        if param[Matrix.COLUMNS_ARE_WHOLE]:
            squared = at_least(column_ratio / columns, squared)
        guess = at_least(math.sqrt(squared) / group[Group.CLIP_THRESHOLD], 1.0)
        divisors[index, 0] = np.float32(1.0 / guess)


@fast
def _sum(values):
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@inline
def sum_squared_updates(first, stop, matrices):
    """Sum u^2 over this rank's part of each matrix parameter, from its row sums."""
    for index in range(first, stop):
        param = matrices[index]
        count = param[Matrix.BATCH] * param[Matrix.ROWS]
        sums = doubles(param[Matrix.RESIDUAL_ROWS] + 16 * count, count)
        doubles(param[Matrix.TOTAL], 1)[0] = _sum(sums)


@inline
def inverse_divisor(total, numel, clip_threshold):
    """Twin of ``factors.clip_divisor``, of which it returns the inverse."""
    return 1.0 / at_least(math.sqrt(total / numel) / clip_threshold, 1.0) + 0.0 * total


@fast
def _update_residual(moment, sums, stride, inverses, beta1, count, eps, beta):
    """Twin of ``factors.true_residuals`` and ``update_moment``; returns the moment's sum."""
    inverse_guess, inverse = inverses
    delta = inverse - inverse_guess
    is_bad = inverse_guess > BAD_GUESS * inverse
    total = 0.0
    keep, add = np.float32(beta), np.float32(1.0 - beta)
    for i in range(moment.size):
        error, cross, square = sums[i], sums[i + stride], sums[i + 2 * stride]
        residual = error + delta * (2.0 * cross + delta * square)
        residual = at_least(residual, 0.0) * beta1 * beta1
        if is_bad:
            residual = square * inverse * inverse * beta1 * beta1
        moment[i] = keep * moment[i] + add * np.float32(
            at_most(residual / count + eps, LARGEST_MEAN)
        )
        total += moment[i]
    return total


@inline
def update_instabilities(first, stop, matrices, factors, groups, divisors):
    """Twin of ``factors.clip_divisor``, ``true_residuals``, ``update_moment`` and ``scales``.

    Args as those of :func:`update_second_moments`; 1/d is written to ``divisors``.
    """
    for index in range(first, stop):
        param, matrix = matrices[factors[index, 0]], factors[index, 1]
        group = groups[param[Matrix.GROUP]]
        batch, rows, columns = param[Matrix.BATCH], param[Matrix.ROWS], param[Matrix.COLUMNS]
        row = floats(param[Matrix.RESIDUAL_ROW] + 4 * matrix * rows, rows)
        column = floats(param[Matrix.RESIDUAL_COLUMN] + 4 * matrix * columns, columns)
        inverse = inverse_divisor(
            doubles(param[Matrix.TOTAL], 1)[0],
            param[Matrix.FULL_NUMEL],
            group[Group.CLIP_THRESHOLD],
        )
        inverses = np.float64(divisors[index, 0]), inverse
        divisors[index, 1] = np.float32(inverse)
        eps, beta, beta1 = group[Group.EPS2], group[Group.BETA3], group[Group.BETA1]
        row_sums = doubles(param[Matrix.RESIDUAL_ROWS], 3 * batch * rows)[matrix * rows :]
        column_sums = doubles(param[Matrix.RESIDUAL_COLUMNS], 3 * batch * columns)
        row_total = _update_residual(
            row, row_sums, batch * rows, inverses, beta1, param[Matrix.FULL_COLUMNS], eps, beta
        )
        column_total = _update_residual(
            column,
            column_sums[matrix * columns :],
            batch * columns,
            inverses,
            beta1,
            param[Matrix.FULL_ROWS],
            eps,
            beta,
        )
        mean = _mean(param, row_total, column_total)
        _inverse_root_ratios(
            row, mean, floats(param[Matrix.ROW_CONFIDENCE] + 4 * matrix * rows, rows)
        )
        _inverse_roots(
            column, floats(param[Matrix.COLUMN_CONFIDENCE] + 4 * matrix * columns, columns)
        )
