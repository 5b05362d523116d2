"""Second moments, instabilities and clip divisors of matrices, from the sums of their storage.

A program takes a range of a row or column factor, a row of the table of ``FactorField``. One kernel
updates the range and writes what it adds to means over the factor; the next adds that up, in every
program the same numbers in the same order, and writes inverse roots.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import tables
from megatron_came.kernels.triton.compiling import (
    BAD_GUESS,
    FACTOR_FIELDS,
    GROUP_FIELDS,
    LARGEST_MEAN,
    LEAST_RATIO,
    PARAM_FIELDS,
    at_least,
    at_most,
    doubles,
    floats,
    kernel,
)


@triton.jit
def _range(factors, index, matrices, BLOCK: tl.constexpr):
    """What a program takes.

    Returns:
        The parameter's row; the matrix in its batch; 1 for a column factor, 0 for a row factor; the
        place of the factor's elements in the tensor, and which of them are there; the table's row
        of the matrix's first range, and how many ranges its row factor has.
    """
    factor = factors + index.to(tl.int64) * FACTOR_FIELDS
    param = matrices + tl.load(factor + tables.FactorField.PARAM) * PARAM_FIELDS
    matrix = tl.load(factor + tables.FactorField.MATRIX)
    top = tl.load(factor + tables.FactorField.TOP)
    row_ranges = tl.cdiv(tl.load(param + tables.ParamField.ROWS), BLOCK)
    number = index - top
    is_column = (number >= row_ranges).to(tl.int64)
    size = tl.load(param + tables.ParamField.ROWS + is_column)
    within = (number - is_column * row_ranges) * BLOCK + tl.arange(0, BLOCK)
    return param, matrix, is_column, matrix * size + within, within < size, top, row_ranges


@triton.jit
def new_moment(moment, mean, beta, index, mask):
    """Twin of ``factors.update_moment``, from float64 means; returns the moment."""
    old = tl.load(moment + index, mask=mask, other=0.0)
    new = beta.to(tl.float32) * old
    new += (1.0 - beta).to(tl.float32) * at_most(mean, LARGEST_MEAN).to(tl.float32)
    tl.store(moment + index, new, mask=mask)
    return new


@triton.jit
def _total(partials, first, count, RANGES: tl.constexpr):
    """Add up what ranges of a factor have written."""
    total = tl.zeros((RANGES,), tl.float64)
    for start in range(0, count, RANGES):
        number = start + tl.arange(0, RANGES)
        total += tl.load(partials + 2 * (first + number), mask=number < count, other=0.0)
    return tl.sum(total, 0)


@kernel
def update_second_moments(from_row, matrices, factors, groups, partials, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment`` of the second moments.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``ParamField``, int64.
        factors: table of ``FactorField``, int64.
        groups: table of ``GroupField``, float64.
        partials: (factors, 2), float64, out: sums of the moment, and of the mean over it.
        BLOCK: elements of a range.
    """
    index = tl.program_id(0) + from_row
    param, _matrix, is_column, place, mask, _top, _ranges = _range(factors, index, matrices, BLOCK)
    group = groups + tl.load(param + tables.ParamField.GROUP) * GROUP_FIELDS
    sums = doubles(tl.load(param + tables.ParamField.SQUARE_ROW_SUMS + is_column))
    count = tl.load(param + tables.ParamField.FULL_COLUMNS - is_column)
    mean = tl.load(sums + place, mask=mask, other=0.0) * (1.0 / count.to(tl.float64))
    mean += tl.load(group + tables.GroupField.EPS1)
    moment = floats(tl.load(param + tables.ParamField.SQUARE_ROW_FACTOR + is_column))
    beta = tl.load(group + tables.GroupField.BETA2)
    new = new_moment(moment, mean, beta, place, mask)
    ratio = at_most(mean, LARGEST_MEAN).to(tl.float32) / new
    tl.store(partials + 2 * index, tl.sum(tl.where(mask, new.to(tl.float64), 0.0), 0))
    tl.store(partials + 2 * index + 1, tl.sum(tl.where(mask, ratio, 0.0), 0).to(tl.float64))


@triton.jit
def inverse_divisor(total, numel, clip_threshold):
    """Twin of ``factors.clip_divisor``, of which it returns the inverse, in float64."""
    return 1.0 / at_least(tl.sqrt(total / numel) / clip_threshold, 1.0) + 0.0 * total


@kernel
def update_instabilities(
    from_row, matrices, factors, groups, divisors, partials, BLOCK: tl.constexpr
):
    """Twin of ``factors.clip_divisor``, ``true_instability`` and ``update_moment``.

    Args as those of :func:`update_second_moments`, and
        divisors: (matrices, 2), fp32: 1/d0; out: 1/d.
    """
    index = tl.program_id(0) + from_row
    param, matrix, is_column, place, mask, top, _ranges = _range(factors, index, matrices, BLOCK)
    group = groups + tl.load(param + tables.ParamField.GROUP) * GROUP_FIELDS
    inverse = inverse_divisor(
        tl.load(doubles(tl.load(param + tables.ParamField.TOTAL))),
        tl.load(param + tables.ParamField.FULL_NUMEL),
        tl.load(group + tables.GroupField.CLIP_THRESHOLD),
    )
    divisors += 2 * (tl.load(param + tables.ParamField.FIRST_MATRIX) + matrix)
    inverse_guess = tl.load(divisors).to(tl.float64)
    if index == top:
        tl.store(divisors + 1, inverse.to(tl.float32))
    sums = doubles(tl.load(param + tables.ParamField.INSTABILITY_ROW_SUMS + is_column))
    stride = tl.load(param + tables.ParamField.ROWS + is_column)
    stride *= tl.load(param + tables.ParamField.BATCH)
    error = tl.load(sums + place, mask=mask, other=0.0)
    cross = tl.load(sums + stride + place, mask=mask, other=0.0)
    square = tl.load(sums + 2 * stride + place, mask=mask, other=0.0)
    delta = inverse - inverse_guess
    instability = at_least(error + delta * (2.0 * cross + delta * square), 0.0)
    is_bad = inverse_guess > inverse * BAD_GUESS
    instability = tl.where(is_bad, square * inverse * inverse, instability)
    beta1 = tl.load(group + tables.GroupField.BETA1)
    count = tl.load(param + tables.ParamField.FULL_COLUMNS - is_column)
    mean = instability * (beta1 * beta1 / count) + tl.load(group + tables.GroupField.EPS2)
    moment = floats(tl.load(param + tables.ParamField.INSTABILITY_ROW_FACTOR + is_column))
    beta = tl.load(group + tables.GroupField.BETA3)
    new = new_moment(moment, mean, beta, place, mask)
    tl.store(partials + 2 * index, tl.sum(tl.where(mask, new.to(tl.float64), 0.0), 0))


@kernel
def scale_factors(
    from_row, matrices, factors, groups, divisors, partials, BLOCK: tl.constexpr,
    RANGES: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Twin of ``factors.scales``; of the second moments also of ``guessed_divisor`` (per matrix).

    Args as those of :func:`update_second_moments`, and
        divisors: (matrices, 2), fp32, out: 1/d0.
        RANGES: of a factor, that are added up at once.
        SQUARES: whether the factors are the second moments.
    """
    index = tl.program_id(0) + from_row
    param, matrix, is_column, place, mask, top, row_ranges = _range(factors, index, matrices, BLOCK)
    rows = tl.load(param + tables.ParamField.ROWS)
    columns = tl.load(param + tables.ParamField.COLUMNS)
    column_ranges = tl.cdiv(columns, BLOCK)
    first_column = top + row_ranges
    # mean(r) = mean(c) of the full matrix, from the factor that this rank holds whole.
    rows_are_whole = tl.load(param + tables.ParamField.ROWS_ARE_WHOLE) != 0
    if rows_are_whole:
        mean = (_total(partials, top, row_ranges, RANGES) / rows).to(tl.float32)
    else:
        mean = (_total(partials, first_column, column_ranges, RANGES) / columns).to(tl.float32)
    if SQUARES:
        moment = floats(tl.load(param + tables.ParamField.SQUARE_ROW_FACTOR + is_column))
        out = floats(tl.load(param + tables.ParamField.ROW_SCALE + is_column))
        if index == top:
            squared = tl.zeros((), tl.float64)
            if rows_are_whole:
                squared = _total(partials + 1, top, row_ranges, RANGES) / rows
            if tl.load(param + tables.ParamField.COLUMNS_ARE_WHOLE) != 0:
                total = _total(partials + 1, first_column, column_ranges, RANGES)
                squared = at_least(total / columns, squared)
            group = groups + tl.load(param + tables.ParamField.GROUP) * GROUP_FIELDS
            clip = tl.load(group + tables.GroupField.CLIP_THRESHOLD)
            inverse = 1.0 / at_least(tl.sqrt(squared) / clip, 1.0)
            number = tl.load(param + tables.ParamField.FIRST_MATRIX) + matrix
            tl.store(divisors + 2 * number, inverse.to(tl.float32))
    else:
        moment = floats(tl.load(param + tables.ParamField.INSTABILITY_ROW_FACTOR + is_column))
        out = floats(tl.load(param + tables.ParamField.ROW_CONFIDENCE + is_column))
    values = tl.load(moment + place, mask=mask, other=1.0)
    ratio = tl.where(is_column != 0, values, at_least(values / mean, LEAST_RATIO))
    tl.store(out + place, 1.0 / tl.sqrt_rn(ratio), mask=mask)


@kernel
def sum_squared_updates(from_row, matrices, MANY: tl.constexpr):
    """Sum u^2 over this rank's part of a matrix parameter, from its row sums.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``ParamField``, int64.
        MANY: row sums that a program reads at once.
    """
    param = matrices + (tl.program_id(0) + from_row).to(tl.int64) * PARAM_FIELDS
    count = tl.load(param + tables.ParamField.BATCH) * tl.load(param + tables.ParamField.ROWS)
    sums = doubles(tl.load(param + tables.ParamField.INSTABILITY_ROW_SUMS)) + 2 * count
    total = tl.zeros((MANY,), tl.float64)
    for first in range(0, count, MANY):
        index = first + tl.arange(0, MANY)
        total += tl.load(sums + index, mask=index < count, other=0.0)
    tl.store(doubles(tl.load(param + tables.ParamField.TOTAL)), tl.sum(total, 0))
