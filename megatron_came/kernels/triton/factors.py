"""Second moments, instabilities and clip divisors of matrices, from the sums of their storage."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import tables
from megatron_came.kernels.triton.compiling import (
    BAD_GUESS,
    GROUP_FIELDS,
    LARGEST_MEAN,
    LEAST_RATIO,
    MATRIX_FIELDS,
    at_least,
    at_most,
    doubles,
    floats,
    kernel,
)


@triton.jit
def update_moment(moment, sums, size, count, eps, beta, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment``; returns the moment's sum, and that of the mean over it."""
    total = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    keep = beta.to(tl.float32)
    add = (1.0 - beta).to(tl.float32)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        mean = at_most(tl.load(sums + index, mask=mask, other=0.0) / count + eps, LARGEST_MEAN)
        old = tl.load(moment + index, mask=mask, other=0.0)
        new = keep * old + add * mean.to(tl.float32)
        tl.store(moment + index, new, mask=mask)
        wide = new.to(tl.float64)
        total += tl.where(mask, wide, 0.0)
        ratio += tl.where(mask, mean / wide, 0.0)
    return tl.sum(total, 0), tl.sum(ratio, 0)


@triton.jit
def _inverse_root_ratios(moment, mean, out, size, BLOCK: tl.constexpr):
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        values = tl.load(moment + index, mask=mask, other=1.0)
        ratio = at_least(values / mean, LEAST_RATIO)
        tl.store(out + index, 1.0 / tl.sqrt_rn(ratio), mask=mask)


@triton.jit
def _inverse_roots(moment, out, size, BLOCK: tl.constexpr):
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        values = tl.load(moment + index, mask=mask, other=1.0)
        tl.store(out + index, 1.0 / tl.sqrt_rn(values), mask=mask)


@triton.jit
def _factor(factors, index, matrices):
    """The parameter's row, and the place in its batch, of a row of ``factors``."""
    param = matrices + tl.load(factors + 2 * index) * MATRIX_FIELDS
    return param, tl.load(factors + 2 * index + 1)


@triton.jit
def _mean(param, row_total, column_total):
    """mean(r) = mean(c) of the full matrix, from the factor that this rank holds whole."""
    if tl.load(param + tables.MatrixField.ROWS_ARE_WHOLE) != 0:
        mean = row_total / tl.load(param + tables.MatrixField.ROWS)
    else:
        mean = column_total / tl.load(param + tables.MatrixField.COLUMNS)
    return mean.to(tl.float32)


@kernel
def update_second_moments(from_row, matrices, factors, groups, divisors, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment``, ``scales`` and ``guessed_divisor`` (of each matrix).

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``MatrixField``, int64.
        factors: (matrices, 2), int64: matrix parameter, place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32, out: 1/d0.
        BLOCK: elements of a factor that a program reads at once.
    """
    index = tl.program_id(0) + from_row
    param, matrix = _factor(factors, index, matrices)
    group = groups + tl.load(param + tables.MatrixField.GROUP) * GROUP_FIELDS
    eps = tl.load(group + tables.GroupField.EPS1)
    beta = tl.load(group + tables.GroupField.BETA2)
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    row = floats(tl.load(param + tables.MatrixField.SQUARE_ROW_FACTOR)) + matrix * rows
    column = floats(tl.load(param + tables.MatrixField.SQUARE_COLUMN_FACTOR)) + matrix * columns
    row_total, row_ratio = update_moment(
        row,
        doubles(tl.load(param + tables.MatrixField.SQUARE_ROW_SUMS)) + matrix * rows,
        rows,
        tl.load(param + tables.MatrixField.FULL_COLUMNS),
        eps,
        beta,
        BLOCK,
    )
    column_total, column_ratio = update_moment(
        column,
        doubles(tl.load(param + tables.MatrixField.SQUARE_COLUMN_SUMS)) + matrix * columns,
        columns,
        tl.load(param + tables.MatrixField.FULL_ROWS),
        eps,
        beta,
        BLOCK,
    )
    tl.debug_barrier()  # the moments are read again
    mean = _mean(param, row_total, column_total)
    row_scale = floats(tl.load(param + tables.MatrixField.ROW_SCALE)) + matrix * rows
    column_scale = floats(tl.load(param + tables.MatrixField.COLUMN_SCALE)) + matrix * columns
    _inverse_root_ratios(row, mean, row_scale, rows, BLOCK)
    _inverse_roots(column, column_scale, columns, BLOCK)
    from_rows = tl.where(
        tl.load(param + tables.MatrixField.ROWS_ARE_WHOLE) != 0, row_ratio / rows, 0.0
    )
    from_columns = tl.where(
        tl.load(param + tables.MatrixField.COLUMNS_ARE_WHOLE) != 0, column_ratio / columns, 0.0
    )
    clip = tl.load(group + tables.GroupField.CLIP_THRESHOLD)
    squared = at_least(from_columns, from_rows)
    guess = at_least(tl.sqrt(squared) / clip, 1.0)
    tl.store(divisors + 2 * index, (1.0 / guess).to(tl.float32))


@kernel
def sum_squared_updates(from_row, matrices, BLOCK: tl.constexpr):
    """Sum u^2 over this rank's part of a matrix parameter, from its row sums."""
    param = matrices + (tl.program_id(0) + from_row).to(tl.int64) * MATRIX_FIELDS
    count = tl.load(param + tables.MatrixField.BATCH) * tl.load(param + tables.MatrixField.ROWS)
    sums = doubles(tl.load(param + tables.MatrixField.INSTABILITY_ROW_SUMS)) + 2 * count
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(sums + index, mask=index < count, other=0.0)
    tl.store(doubles(tl.load(param + tables.MatrixField.TOTAL)), tl.sum(total, 0))


@triton.jit
def inverse_divisor(total, numel, clip_threshold):
    """Twin of ``factors.clip_divisor``, of which it returns the inverse, in float64."""
    return 1.0 / at_least(tl.sqrt(total / numel) / clip_threshold, 1.0) + 0.0 * total


@triton.jit
def _update_instability(
    moment, sums, stride, size, inverse_guess, inverse, beta1, count, eps, beta, BLOCK: tl.constexpr
):
    """Twin of ``factors.true_instability`` and ``update_moment``; returns the moment's sum."""
    delta = inverse - inverse_guess
    is_bad = inverse_guess > inverse * BAD_GUESS
    total = tl.zeros((BLOCK,), tl.float64)
    keep = beta.to(tl.float32)
    add = (1.0 - beta).to(tl.float32)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        error = tl.load(sums + index, mask=mask, other=0.0)
        cross = tl.load(sums + stride + index, mask=mask, other=0.0)
        square = tl.load(sums + 2 * stride + index, mask=mask, other=0.0)
        instability = error + delta * (2.0 * cross + delta * square)
        instability = tl.where(is_bad, square * inverse * inverse, at_least(instability, 0.0))
        instability = instability * beta1 * beta1
        old = tl.load(moment + index, mask=mask, other=0.0)
        new = keep * old + add * at_most(instability / count + eps, LARGEST_MEAN).to(tl.float32)
        tl.store(moment + index, new, mask=mask)
        total += tl.where(mask, new.to(tl.float64), 0.0)
    return tl.sum(total, 0)


@kernel
def update_instabilities(from_row, matrices, factors, groups, divisors, BLOCK: tl.constexpr):
    """Twin of ``factors.clip_divisor``, ``true_instability``, ``update_moment`` and ``scales``.

    Args as those of :func:`update_second_moments`; 1/d is written to ``divisors``.
    """
    index = tl.program_id(0) + from_row
    param, matrix = _factor(factors, index, matrices)
    group = groups + tl.load(param + tables.MatrixField.GROUP) * GROUP_FIELDS
    eps = tl.load(group + tables.GroupField.EPS2)
    beta = tl.load(group + tables.GroupField.BETA3)
    beta1 = tl.load(group + tables.GroupField.BETA1)
    batch = tl.load(param + tables.MatrixField.BATCH)
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    inverse = inverse_divisor(
        tl.load(doubles(tl.load(param + tables.MatrixField.TOTAL))),
        tl.load(param + tables.MatrixField.FULL_NUMEL),
        tl.load(group + tables.GroupField.CLIP_THRESHOLD),
    )
    inverse_guess = tl.load(divisors + 2 * index).to(tl.float64)
    tl.store(divisors + 2 * index + 1, inverse.to(tl.float32))
    row = floats(tl.load(param + tables.MatrixField.INSTABILITY_ROW_FACTOR)) + matrix * rows
    column = (
        floats(tl.load(param + tables.MatrixField.INSTABILITY_COLUMN_FACTOR)) + matrix * columns
    )
    row_total = _update_instability(
        row,
        doubles(tl.load(param + tables.MatrixField.INSTABILITY_ROW_SUMS)) + matrix * rows,
        batch * rows,
        rows,
        inverse_guess,
        inverse,
        beta1,
        tl.load(param + tables.MatrixField.FULL_COLUMNS),
        eps,
        beta,
        BLOCK,
    )
    column_total = _update_instability(
        column,
        doubles(tl.load(param + tables.MatrixField.INSTABILITY_COLUMN_SUMS)) + matrix * columns,
        batch * columns,
        columns,
        inverse_guess,
        inverse,
        beta1,
        tl.load(param + tables.MatrixField.FULL_ROWS),
        eps,
        beta,
        BLOCK,
    )
    tl.debug_barrier()  # the moments are read again
    mean = _mean(param, row_total, column_total)
    row_confidence = floats(tl.load(param + tables.MatrixField.ROW_CONFIDENCE)) + matrix * rows
    column_confidence = floats(tl.load(param + tables.MatrixField.COLUMN_CONFIDENCE))
    _inverse_root_ratios(row, mean, row_confidence, rows, BLOCK)
    _inverse_roots(column, column_confidence + matrix * columns, columns, BLOCK)
