"""Pass 3 of matrices whose blocks of int8 momentum are not rows of tiles: over the flat slice."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import storage, tables
from megatron_came.kernels.triton.compiling import (
    BLOCKS_FIELDS,
    GROUP_FIELDS,
    INT8_BLOCK,
    PARAM_FIELDS,
    addresses_of,
    divisor_of,
    floats,
    full_place_of,
    kernel,
    note_tables,
    over_lines,
    rates,
    scales_of,
)


@triton.jit
def inside_blocks(BLOCKS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr):
    """Places of elements after the first block's first: all blocks' first parts, then the next.

    Args:
        BLOCKS: how many.
        LANES: of a part, which is a line.
        TOGETHER: elements that a lane has one after another, of which these are the first.
    """
    lines = tl.arange(0, INT8_BLOCK // (LANES * TOGETHER) * BLOCKS)
    begins = lines % BLOCKS * INT8_BLOCK + lines // BLOCKS * (LANES * TOGETHER)
    return begins[:, None] + tl.arange(0, LANES)[None, :] * TOGETHER


@triton.jit
def _spread(values, TOGETHER: tl.constexpr):
    """Give each of so many elements the value that they have in common."""
    if TOGETHER == 1:
        return values
    LINES: tl.constexpr = values.shape[0]
    LANES: tl.constexpr = values.shape[1]
    values = tl.broadcast_to(values[:, :, None], (LINES, LANES, TOGETHER))
    return tl.reshape(values, (LINES, LANES * TOGETHER))


@triton.jit
def _shape_of(param):
    """Rows and columns of a matrix, rows of the full one, and ``Shard.row_parts``, in 32 bits."""
    return (
        tl.load(param + tables.ParamField.ROWS).to(tl.uint32),
        tl.load(param + tables.ParamField.COLUMNS).to(tl.uint32),
        tl.load(param + tables.ParamField.FULL_ROWS).to(tl.uint32),
        tl.load(param + tables.ParamField.PART_ROWS).to(tl.uint32),
        tl.load(param + tables.ParamField.PART_JUMP).to(tl.uint32),
    )


@triton.jit
def _rows_of(
    leading, here, first_row, first_column, rows, columns, full_rows, part_rows, part_jump,
    full_place, full_columns, row_scales, row_confidences, divisors, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Find elements that lie after one of a first matrix, without signs, which divides fastest.

    Returns:
        Of each element, or of the first of so many together, for each of them: scale over divisor,
        confidence, place in the full tensor, and place in the matrices' column statistics.
    """
    after = first_column + leading.to(tl.uint32)
    below = after // columns
    column = after - below * columns
    row = first_row + below
    between = row // rows
    own_row = row - between * rows
    row_scale = tl.load(row_scales + row, mask=here, other=0.0)
    row_scale *= tl.load(divisors + 2 * between, mask=here, other=0.0)
    row_confidence = tl.load(row_confidences + row, mask=here, other=0.0)
    full_row = between * full_rows + own_row + own_row // part_rows * part_jump
    origin = full_place + full_row.to(tl.int64) * full_columns + column.to(tl.int64)
    return (
        _spread(row_scale, TOGETHER),
        _spread(row_confidence, TOGETHER),
        _spread(origin, TOGETHER),
        _spread((between * columns + column).to(tl.int32), TOGETHER),
    )


@kernel
def apply_blocks(
    from_row, matrices, blocks, groups, divisors, STEP: tl.constexpr, ALIGNED: tl.constexpr,
    GRAD_IS_BF16: tl.constexpr, HAS_REMAINDER: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Twin of ``tiles.apply_tiles`` for int8, of ``BlocksField``'s table; STEP is of blocks."""
    note_tables()
    # Aligned ones lie in one row: it is found, and its scales are read, once for the four.
    TOGETHER: tl.constexpr = 4 if ALIGNED else 1
    taken = blocks + (tl.program_id(0) + from_row).to(tl.int64) * BLOCKS_FIELDS
    param = matrices + tl.load(taken + tables.BlocksField.PARAM) * PARAM_FIELDS
    place = tl.load(taken + tables.BlocksField.FIRST)
    count = (tl.load(taken + tables.BlocksField.STOP) - place).to(tl.int32)
    matrix = tl.load(taken + tables.BlocksField.MATRIX)
    first_row = tl.load(taken + tables.BlocksField.ROW).to(tl.uint32)
    first_column = tl.load(taken + tables.BlocksField.COLUMN).to(tl.uint32)
    rows, columns, full_rows, part_rows, part_jump = _shape_of(param)
    full_place, full_columns = full_place_of(param, matrix, matrix * 0, 0)
    if ALIGNED:
        place, count = tl.multiple_of(place, 4), tl.multiple_of(count, 4)
        full_place = (full_place >> 2) << 2  # tells the compiler that it is one
    grads, momenta, scales, weights, remainders, model = addresses_of(param)
    row_scales, column_scales, row_confidences, column_confidences = scales_of(param, matrix)
    divisors = divisor_of(divisors, param, matrix, 1)
    group = groups + tl.load(param + tables.ParamField.GROUP) * GROUP_FIELDS
    beta1, rest, lr, decay = rates(group)
    key = storage.step_key(tl.load(param + tables.ParamField.KEY), group)
    beyond = (tl.arange(0, 32 * TOGETHER) & (TOGETHER - 1))[None, :]
    for first in range(0, count, STEP * INT8_BLOCK):
        leading = first + inside_blocks(STEP, 32, TOGETHER)
        row_scale, row_confidence, origin, columns_on = _rows_of(
            leading, leading < count, first_row, first_column, rows, columns, full_rows, part_rows,
            part_jump, full_place, full_columns, row_scales, row_confidences, divisors, TOGETHER,
        )  # fmt: skip
        offset = first + inside_blocks(STEP, 32 * TOGETHER, 1)
        mask = offset < count
        at = tl.max_contiguous(tl.multiple_of(columns_on + beyond, (1, TOGETHER)), (1, TOGETHER))
        column_scale = tl.load(column_scales + at, mask=mask, other=0.0)
        column_confidence = tl.load(column_confidences + at, mask=mask, other=0.0)
        begins = first + tl.arange(0, STEP) * INT8_BLOCK
        block = (place >> 8) + (begins >> 8)
        scale = tl.load(floats(scales) + block, mask=begins < count, other=0.0) * beta1
        grad = storage.read(grads, GRAD_IS_BF16, place, offset, mask, ALIGNED)
        weight = storage.read_weights(
            weights, remainders, HAS_REMAINDER, place, offset, mask, ALIGNED
        )
        momentum = storage.read_int8(momenta, place, offset, mask, ALIGNED)
        momentum = momentum * over_lines(scale, offset) + rest * (grad * row_scale * column_scale)
        storage.store_momentum(
            momenta, scales, False, True, block, begins < count, place, offset, momentum, mask,
            storage.random_bits(origin, beyond, key), ALIGNED,
        )  # fmt: skip
        weight -= decay * weight
        weight -= (row_confidence * lr) * (momentum * column_confidence)
        storage.store_weights(
            weights, remainders, model, HAS_REMAINDER, MODEL, MODEL == 1, place, offset, weight,
            mask, ALIGNED,
        )  # fmt: skip
