"""How kernels are compiled, the widths of their tables, and pointers from addresses."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from megatron_came.core import factors, int8, passes, rounding
from megatron_came.kernels.triton import tables

# To be imported by name: Triton does not notice a change of what it reaches through a module.
SQUARE_SCALE = tl.constexpr(passes.SQUARE_SCALE)
SQUARE_UNSCALE = tl.constexpr(passes.SQUARE_SCALE**-2)
UPDATE_SCALE = tl.constexpr(passes.UPDATE_SCALE)
UPDATE_UNSCALE = tl.constexpr(passes.UPDATE_SCALE**-2)
# See megatron_came.core.factors.
LARGEST_MEAN = tl.constexpr(factors.largest_mean(torch.float32))
LEAST_RATIO = tl.constexpr(factors.LEAST_RATIO)
BAD_GUESS = tl.constexpr(factors.BAD_GUESS)
MIX_FACTOR, MIX_FACTOR_2 = map(tl.constexpr, rounding.MIX_FACTORS)
STEP_FACTOR = tl.constexpr(rounding.STEP_FACTOR)
HIGH_FACTOR = tl.constexpr(rounding.HIGH_FACTOR)
INT8_BLOCK = tl.constexpr(int8.BLOCK)
# Beyond all offsets in a tile, which are below 2^30; it fits 32 bits, and vector loads.
FAR = tl.constexpr(2**31 - 2**16)
PARAM_FIELDS = tl.constexpr(len(tables.ParamField))
TILE_FIELDS = tl.constexpr(len(tables.TileField))
ADDITION_FIELDS = tl.constexpr(len(tables.AdditionField))
BLOCKS_FIELDS = tl.constexpr(len(tables.BlocksField))
FACTOR_FIELDS = tl.constexpr(len(tables.FactorField))
GROUP_FIELDS = tl.constexpr(len(tables.GroupField))
_FINGERPRINT = tl.constexpr(tables.FINGERPRINT)

# A number that changes from launch to launch must not be compiled into a kernel.
kernel = partial(triton.jit, do_not_specialize=["from_row"])


@triton.jit
def note_tables():
    """Make kernels depend on the tables' columns.

    Triton's cache knows a kernel by its source and its constants; the columns are in another file.
    """
    tl.static_assert(_FINGERPRINT >= 0)


@triton.jit
def floats(address):
    """Turn an address into a pointer to fp32 numbers."""
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def over_lines(values, like):
    """Give each element what is given for its row or block.

    Args:
        values: of rows, or blocks.
        like: of which there is a line for the first part of each, then for the next parts.
    """
    SHAPE: tl.constexpr = (like.shape[0] // values.shape[0], values.shape[0], like.shape[1])
    return tl.reshape(tl.broadcast_to(values[None, :, None], SHAPE), like.shape)


@triton.jit
def at_most(value, high):
    """``torch.clamp(max=high)``: NaN stays NaN."""
    return tl.where(value > high, high, value)


@triton.jit
def at_least(value, low):
    """``torch.clamp(min=low)``: NaN stays NaN, which ``tl.maximum`` drops."""
    return tl.where(value < low, low, value)


@triton.jit
def doubles(address):
    """Turn an address into a pointer to float64 numbers."""
    note_tables()
    return address.to(tl.pointer_type(tl.float64))


@triton.jit
def rates(group):
    """beta1, 1 - beta1, lr and lr * weight_decay in fp32."""
    beta1 = tl.load(group + tables.GroupField.BETA1)
    lr = tl.load(group + tables.GroupField.LR)
    decay = lr * tl.load(group + tables.GroupField.WEIGHT_DECAY)
    return (
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        lr.to(tl.float32),
        decay.to(tl.float32),
    )


@triton.jit
def addresses_of(param):
    """Addresses of a parameter's gradient, momentum, its scales, weights, remainders and copy."""
    return (
        tl.load(param + tables.ParamField.GRAD),
        tl.load(param + tables.ParamField.EXP_AVG),
        tl.load(param + tables.ParamField.EXP_AVG_SCALE),
        tl.load(param + tables.ParamField.PARAM),
        tl.load(param + tables.ParamField.REMAINDER),
        tl.load(param + tables.ParamField.MODEL_WEIGHT),
    )


@triton.jit
def scales_of(param, matrix):
    """Pointers to row and column scales, and row and column confidences, of a matrix."""
    rows = matrix * tl.load(param + tables.ParamField.ROWS)
    columns = matrix * tl.load(param + tables.ParamField.COLUMNS)
    return (
        floats(tl.load(param + tables.ParamField.ROW_SCALE)) + rows,
        floats(tl.load(param + tables.ParamField.COLUMN_SCALE)) + columns,
        floats(tl.load(param + tables.ParamField.ROW_CONFIDENCE)) + rows,
        floats(tl.load(param + tables.ParamField.COLUMN_CONFIDENCE)) + columns,
    )


@triton.jit
def divisor_of(divisors, param, matrix, number: tl.constexpr):
    """Pointer to 1/d0 of matrices of a parameter if the number is 0, to 1/d if it is 1."""
    return divisors + 2 * (tl.load(param + tables.ParamField.FIRST_MATRIX) + matrix) + number


@triton.jit
def full_place_of(param, matrix, row, column):
    """Where random bits belong to: place in the full tensor of an element of the local one.

    Returns:
        The place, and the columns of the full matrix, which are one row.
    """
    full_row = (matrix + tl.load(param + tables.ParamField.BATCH_OFFSET)) * tl.load(
        param + tables.ParamField.FULL_ROWS
    )
    part = row // tl.load(param + tables.ParamField.PART_ROWS)
    full_row += row + part * tl.load(param + tables.ParamField.PART_JUMP)
    full_row += tl.load(param + tables.ParamField.ROW_OFFSET)
    full_column = column + tl.load(param + tables.ParamField.COLUMN_OFFSET)
    # Below 2^30, which the compiler shall know: it multiplies 32 bits.
    full_columns = tl.load(param + tables.ParamField.FULL_COLUMNS).to(tl.int32).to(tl.int64)
    return full_row * full_columns + full_column, full_columns
