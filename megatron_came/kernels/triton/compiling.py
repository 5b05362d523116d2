"""How kernels are compiled, the widths of their tables, and pointers from addresses."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from megatron_came.core import factors, int8, rounding
from megatron_came.kernels.triton import tables

# To be imported by name: Triton does not notice a change of what it reaches through a module.
SQUARE_SCALE = tl.constexpr(2.0**-10)  # see megatron_came.core.passes
SQUARE_UNSCALE = tl.constexpr(2.0**20)
UPDATE_SCALE = tl.constexpr(2.0**-16)
UPDATE_UNSCALE = tl.constexpr(2.0**32)
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
MATRIX_FIELDS = tl.constexpr(len(tables.MatrixField))
VECTOR_FIELDS = tl.constexpr(len(tables.VectorField))
TILE_FIELDS = tl.constexpr(len(tables.TileField))
ADDITION_FIELDS = tl.constexpr(len(tables.AdditionField))
BLOCKS_FIELDS = tl.constexpr(len(tables.BlocksField))
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
def aligned_floats(address, ALIGNED: tl.constexpr):
    """Turn an address, of 16 bytes if ALIGNED, into a pointer to fp32 numbers."""
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:  # here, because a hint on the result of a call is lost
        pointer = tl.multiple_of(pointer, 16)
    return pointer


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
def momenta_of(param):
    """Address of a parameter's momentum, whether it is bf16, and the address of its scales."""
    return (
        tl.load(param + tables.MatrixField.EXP_AVG),
        tl.load(param + tables.MatrixField.EXP_AVG_IS_BF16),
        tl.load(param + tables.MatrixField.EXP_AVG_SCALE),
    )


@triton.jit
def scales_of(param):
    """Pointers to a parameter's row and column scales, and row and column confidences."""
    return (
        floats(tl.load(param + tables.MatrixField.ROW_SCALE)),
        floats(tl.load(param + tables.MatrixField.COLUMN_SCALE)),
        floats(tl.load(param + tables.MatrixField.ROW_CONFIDENCE)),
        floats(tl.load(param + tables.MatrixField.COLUMN_CONFIDENCE)),
    )


@triton.jit
def weights_of(param):
    """Addresses of a parameter's weights, remainders and model weights; whether these are bf16."""
    return (
        tl.load(param + tables.MatrixField.PARAM),
        tl.load(param + tables.MatrixField.REMAINDER),
        tl.load(param + tables.MatrixField.MODEL_WEIGHT),
        tl.load(param + tables.MatrixField.MODEL_IS_BF16),
    )


@triton.jit
def divisor_of(divisors, param, matrix, number: tl.constexpr):
    """Pointer to 1/d0 of matrices of a parameter if the number is 0, to 1/d if it is 1."""
    return divisors + 2 * (tl.load(param + tables.MatrixField.FIRST_MATRIX) + matrix) + number


@triton.jit
def full_places(param, matrix, row, column):
    """Where random bits belong to: row and column of a tile's first element in the full matrix.

    Returns:
        Row and column; columns of the full matrix; local rows of one of the tensor's equal parts,
        and rows of the full matrix between the local ones of two.
    """
    full_row = matrix + tl.load(param + tables.MatrixField.BATCH_OFFSET)
    full_row = full_row * tl.load(param + tables.MatrixField.FULL_ROWS) + row
    full_row += tl.load(param + tables.MatrixField.ROW_OFFSET)
    full_column = column + tl.load(param + tables.MatrixField.COLUMN_OFFSET)
    full_columns = tl.load(param + tables.MatrixField.FULL_COLUMNS)
    part_rows = tl.load(param + tables.MatrixField.PART_ROWS)
    part_jump = tl.load(param + tables.MatrixField.PART_JUMP)
    return full_row, full_column, full_columns, part_rows, part_jump
