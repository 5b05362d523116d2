"""Pass 3 of matrices whose momentum is int8, over blocks of 256 elements of the flat slice."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import storage, tables
from megatron_came.kernels.triton.compiling import (
    BLOCKS_FIELDS,
    GROUP_FIELDS,
    INT8_BLOCK,
    MATRIX_FIELDS,
    divisor_of,
    full_places,
    kernel,
    note_tables,
    rates,
    scales_of,
)


@triton.jit
def _coordinates(param, first, inside):
    """Coordinates of flat elements of a slice, ``inside`` after the ``first``.

    Returns:
        Matrix, row and column of each; where its row's and its column's scale lie.
    """
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    # Of the first element in 64 bits, then of the others in 32, which divide faster.
    place = tl.load(param + tables.MatrixField.START) + first
    base = place // columns
    first_matrix = base // rows
    from_base = (place - base * columns).to(tl.int32) + inside
    below = from_base // columns.to(tl.int32)
    column = from_base - below * columns.to(tl.int32)
    row = (base - first_matrix * rows).to(tl.int32) + below
    matrices_on = row // rows.to(tl.int32)
    row -= matrices_on * rows.to(tl.int32)
    matrix = first_matrix + matrices_on
    return matrix, row, column, base + below, matrix * columns + column


@kernel
def apply_blocks(from_row, matrices, blocks, groups, divisors, BLOCKS: tl.constexpr):
    """Twin of ``passes.apply_update`` for matrices whose momentum is int8.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``MatrixField``, int64.
        blocks: table of ``BlocksField``, int64.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        BLOCKS: of a row of their table.
    """
    note_tables()
    row_of_blocks = blocks + (tl.program_id(0) + from_row).to(tl.int64) * BLOCKS_FIELDS
    param = matrices + tl.load(row_of_blocks + tables.BlocksField.PARAM) * MATRIX_FIELDS
    first = tl.load(row_of_blocks + tables.BlocksField.FIRST)
    stop = tl.load(row_of_blocks + tables.BlocksField.STOP)
    numbers = tl.arange(0, BLOCKS)
    inside = numbers[:, None] * INT8_BLOCK + tl.arange(0, INT8_BLOCK)[None, :]
    matrix, row, column, row_place, column_place = _coordinates(param, first, inside)
    index = first + inside
    mask = index < stop

    row_scales, column_scales, row_confidences, column_confidences = scales_of(param)
    row_scale = tl.load(row_scales + row_place, mask=mask, other=0.0)
    column_scale = tl.load(column_scales + column_place, mask=mask, other=0.0)
    row_confidence = tl.load(row_confidences + row_place, mask=mask, other=0.0)
    column_confidence = tl.load(column_confidences + column_place, mask=mask, other=0.0)
    inverse_divisor = tl.load(divisor_of(divisors, param, matrix, 1), mask=mask, other=0.0)
    group = groups + tl.load(param + tables.MatrixField.GROUP) * GROUP_FIELDS
    beta1, rest, lr, decay = rates(group)

    grads = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    momenta = tl.load(param + tables.MatrixField.EXP_AVG)
    momentum_scales = tl.load(param + tables.MatrixField.EXP_AVG_SCALE)
    weights = tl.load(param + tables.MatrixField.PARAM)
    remainders = tl.load(param + tables.MatrixField.REMAINDER)
    grad = storage.read(grads, is_bf16, index, mask, False)
    momentum = storage.momenta(momenta, 0, momentum_scales, index, mask, False)
    weight = storage.weights(weights, remainders, index, mask, False)
    momentum = beta1 * momentum + rest * (grad * (row_scale * inverse_divisor) * column_scale)
    weight -= decay * weight
    weight -= (row_confidence * lr) * (momentum * column_confidence)
    storage.store_weights(weights, remainders, index, weight, mask, False)
    model = tl.load(param + tables.MatrixField.MODEL_WEIGHT)
    if model != 0:
        model_is_bf16 = tl.load(param + tables.MatrixField.MODEL_IS_BF16)
        storage.store_short(model, model_is_bf16, index, weight, mask, False)

    full_row, full_column, full_columns, part_rows, part_jump = full_places(
        param, matrix, row, column
    )
    full_row += row // part_rows.to(tl.int32) * part_jump
    full_place = full_row * full_columns + full_column
    key = storage.step_key(tl.load(param + tables.MatrixField.KEY), group)
    block = first // INT8_BLOCK + numbers
    storage.store_int8(momenta, momentum_scales, block, index, momentum, mask, full_place, key)
