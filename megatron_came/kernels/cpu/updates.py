"""Pass 3 over tiles of matrices, or over spans where the momentum is int8: momentum and weights."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import numpy as np

from megatron_came.kernels.cpu import storage
from megatron_came.kernels.cpu.compiling import elementwise, floats, inline
from megatron_came.kernels.cpu.tiles import row_in_slice
from megatron_came.kernels.triton.tables import GroupField as Group
from megatron_came.kernels.triton.tables import MatrixField as Matrix
from megatron_came.kernels.triton.tables import SpanField as Span
from megatron_came.kernels.triton.tables import TileField as Tile


@elementwise
def _apply_row(
    param, grad, exp_avg, column_scale, column_confidence, row_scale, step, beta1, rest, decay
):
    for i in range(param.size):
        momentum = beta1 * exp_avg[i] + rest * (grad[i] * row_scale * column_scale[i])
        exp_avg[i] = momentum
        weight = param[i]
        weight -= decay * weight
        param[i] = weight - step * (momentum * column_confidence[i])


@inline
def _rates(param, groups):
    """What all elements of a parameter share.

    Returns:
        lr, beta1, 1 - beta1 and lr times decay, fp32; the key of this step's random bits.
    """
    group = groups[param[Matrix.GROUP]]
    lr, beta1 = group[Group.LR], group[Group.BETA1]
    return (
        np.float32(lr),
        np.float32(beta1),
        np.float32(1.0 - beta1),
        np.float32(lr * group[Group.WEIGHT_DECAY]),
        storage.step_key(param[Matrix.KEY], group[Group.STEP]),
    )


@inline
def _inverse_divisor(param, divisors, matrix):
    return divisors[param[Matrix.FIRST_MATRIX] + matrix, 1]


@inline
def _update(
    param, rates, inverse_divisor, matrix, row, column, offset, momentum, bits, grad_buffer, buffer
):
    """Update part of a row: the momentum in fp32, the weights where they are kept.

    Args:
        param: row of the table of matrix parameters.
        rates: see :func:`_rates`.
        inverse_divisor: 1/d.
        matrix: place in the batch.
        row: of the matrix.
        column: first one.
        offset: first element, in the slice.
        momentum: fp32.
        bits: like momentum, uint16, out: what the momentum is to be rounded with.
        grad_buffer: for the gradient in fp32.
        buffer: for the weights in fp32.
    """
    count, (lr, beta1, rest, decay, key) = momentum.size, rates
    rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
    row_scale = floats(param[Matrix.ROW_SCALE] + 4 * (matrix * rows + row), 1)[0]
    row_confidence = floats(param[Matrix.ROW_CONFIDENCE] + 4 * (matrix * rows + row), 1)[0]
    place = 4 * (matrix * columns + column)
    weights = storage.weights(param[Matrix.PARAM], param[Matrix.REMAINDER], offset, count, buffer)
    _apply_row(
        weights,
        storage.gradient(param, offset, count, grad_buffer),
        momentum,
        floats(param[Matrix.COLUMN_SCALE] + place, count),
        floats(param[Matrix.COLUMN_CONFIDENCE] + place, count),
        row_scale * inverse_divisor,
        lr * row_confidence,
        beta1,
        rest,
        decay,
    )
    storage.keep_weights(param[Matrix.PARAM], param[Matrix.REMAINDER], offset, weights)
    storage.copy_to_model(param[Matrix.MODEL_WEIGHT], offset, weights)
    if param[Matrix.EXP_AVG_IS_BF16] or param[Matrix.EXP_AVG_SCALE]:
        full_row = (matrix + param[Matrix.BATCH_OFFSET]) * param[Matrix.FULL_ROWS]
        full_row += row + param[Matrix.ROW_OFFSET]
        full_row += row // param[Matrix.PART_ROWS] * param[Matrix.PART_JUMP]
        full_place = full_row * param[Matrix.FULL_COLUMNS] + param[Matrix.COLUMN_OFFSET] + column
        storage.draw(full_place, key, bits)


@inline
def apply_tiles(first, stop, matrices, tiles, groups, divisors, tile_columns, buffers):
    """Twin of ``passes.apply_update`` for matrices whose momentum is not int8.

    Args as those of :func:`megatron_came.kernels.cpu.tiles.instability_tiles`, with 1/d known.
    """
    grads, momenta, weights, bits = buffers
    for index in range(first, stop):
        tile = tiles[index]
        param, matrix = matrices[tile[Tile.PARAM]], tile[Tile.MATRIX]
        rates, inverse_divisor = _rates(param, groups), _inverse_divisor(param, divisors, matrix)
        for row in range(tile[Tile.ROW], tile[Tile.STOP_ROW]):
            low, high, start = row_in_slice(param, tile, row, tile_columns)
            if low < high:
                offset, count = low - param[Matrix.START], high - low
                momentum = storage.momentum(param, offset, count, momenta)
                column, drawn = tile[Tile.COLUMN] + low - start, bits[:count]
                _update(
                    param, rates, inverse_divisor, matrix, row, column, offset, momentum, drawn,
                    grads, weights,
                )  # fmt: skip
                storage.keep_momentum(
                    param[Matrix.EXP_AVG], param[Matrix.EXP_AVG_IS_BF16], 0, offset, momentum, drawn
                )


@inline
def apply_spans(first, stop, matrices, spans, groups, divisors, buffers):
    """Twin of ``passes.apply_update`` for matrices whose momentum is int8.

    Args:
        first: row of the table of spans.
        stop: one past the last row.
        matrices: table of ``MatrixField``.
        spans: table of ``SpanField``.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        buffers: this thread's, see ``tiles.buffers_in``.
    """
    grads, momenta, weights, bits = buffers
    for index in range(first, stop):
        param = matrices[spans[index, Span.PARAM]]
        rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
        low, high = spans[index, Span.FIRST], spans[index, Span.STOP]
        momentum, drawn = momenta[: high - low], bits[: high - low]
        address, scales = param[Matrix.EXP_AVG], param[Matrix.EXP_AVG_SCALE]
        rates = _rates(param, groups)
        storage.read_int8(address, scales, low, high - low, momentum)
        offset = low
        while offset < high:
            all_rows = (param[Matrix.START] + offset) // columns
            column = param[Matrix.START] + offset - all_rows * columns
            matrix = all_rows // rows
            end = min(offset + columns - column, high)
            part, some = momentum[offset - low : end - low], drawn[offset - low : end - low]
            row = all_rows - matrix * rows
            inverse_divisor = _inverse_divisor(param, divisors, matrix)
            _update(
                param, rates, inverse_divisor, matrix, row, column, offset, part, some, grads,
                weights,
            )  # fmt: skip
            offset = end
        storage.keep_momentum(address, 0, scales, low, momentum, drawn)
