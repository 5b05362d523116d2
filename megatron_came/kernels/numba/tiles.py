"""The passes over tiles and spans of matrices, and over the strips that add up the tiles' sums.

Every function takes the rows [first, stop) of one table, so that threads can share the work; what
is summed, and in which order, does not depend on their number.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from megatron_came.kernels.numba import storage
from megatron_came.kernels.numba.compiling import (
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    doubles,
    elementwise,
    fast,
    floats,
    inline,
    shorts,
    to_float32,
)
from megatron_came.kernels.tables import GroupField as Group
from megatron_came.kernels.tables import MatrixField as Matrix
from megatron_came.kernels.tables import SpanField as Span
from megatron_came.kernels.tables import StripField as Strip
from megatron_came.kernels.tables import TileField as Tile

# In pass 2 several rows are taken at once, to add less often to the sums of columns: more of them
# where these leave the innermost cache. They lie far apart, as memory is read fastest in a few
# streams, each from one end of a page to the other.
_ROWS_AT_ONCE = 2
_LONG_ROWS_AT_ONCE = 4
_LONG_ROW = 1024


def room_elements(tile_columns: int, span_elements: int) -> int:
    """Elements of each of the buffers of :func:`buffers_in`."""
    return max(_LONG_ROWS_AT_ONCE * tile_columns, span_elements)


@inline
def buffers_in(room):
    """Divide a thread's room for what is not fp32 in memory.

    Args:
        room: (4, elements), fp32, with as many elements as :func:`room_elements` says.

    Returns:
        Gradients and momenta of a few rows, weights of one, fp32; random bits of one, uint16.
    """
    address, count = room.ctypes.data, room.shape[1]
    return (
        floats(address, count),
        floats(address + 4 * count, count),
        floats(address + 8 * count, count),
        shorts(address + 12 * count, count),
    )


@inline
def _slot(scratch, index):
    """Address of a slot."""
    return scratch.ctypes.data + 4 * index * scratch.shape[1] * scratch.shape[2]


@inline
def _row_in_slice(param, tile, row, tile_columns):
    """What of a tile's row lies in the slice.

    Returns:
        [low, high) of the flattened local tensor; the place there of the tile's first column.
    """
    first = (tile[Tile.MATRIX] * param[Matrix.ROWS] + row) * param[Matrix.COLUMNS]
    end = first + min(tile[Tile.COLUMN] + tile_columns, param[Matrix.COLUMNS])
    first += tile[Tile.COLUMN]
    return max(first, param[Matrix.START]), min(end, param[Matrix.STOP]), first


@inline
def _clear(slot, kinds, width, used):
    for kind in range(kinds):
        floats(slot + 4 * kind * width, used)[:] = 0.0


@fast
def _square_row(grad, column_sums):
    total = np.float32(0.0)
    for i in range(grad.size):
        scaled = grad[i] * SQUARE_SCALE
        square = scaled * scaled
        total += square
        column_sums[i] += square
    return total


@inline
def square_tiles(first, stop, origin, matrices, tiles, scratch, tile_rows, tile_columns, buffers):
    """Twin of ``passes.add_squared_sums``: the row and column sums of each tile, to its slot.

    Args:
        first: row of the table of tiles.
        stop: one past the last row.
        origin: the tile that has the first slot.
        matrices: table of ``MatrixField``.
        tiles: table of ``TileField``.
        scratch: (slots, 3, tile_rows + tile_columns), fp32, out; the first of the three is used.
        tile_rows: of a tile.
        tile_columns: of a tile.
        buffers: this thread's, see :func:`buffers_in`.
    """
    width = tile_rows + tile_columns
    buffer = buffers[0]
    for index in range(first, stop):
        tile = tiles[index]
        param = matrices[tile[Tile.PARAM]]
        slot = _slot(scratch, index - origin)
        _clear(slot, 1, width, tile_rows + min(tile_columns, param[Matrix.COLUMNS]))
        row_sums = floats(slot, tile_rows)
        for row in range(tile[Tile.ROW], tile[Tile.STOP_ROW]):
            low, high, start = _row_in_slice(param, tile, row, tile_columns)
            if low < high:
                count = high - low
                row_sums[row - tile[Tile.ROW]] = _square_row(
                    storage.gradient(param, low - param[Matrix.START], count, buffer),
                    floats(slot + 4 * (tile_rows + low - start), count),
                )


@intrinsic
def _assume_no_overlap(_context):
    """Promise that none of the function's pointers reach what another one writes."""

    def generate(context, builder, _signature, _args):
        for argument in builder.function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.none(), generate


def _instability_rows(rows):
    @fast
    def instability_rows(
        grad,
        grad_stride,
        exp_avg,
        exp_avg_stride,
        count,
        row_scale,
        column_scale,
        apart,
        inverse_guess,
        row_sums,
        column_errors,
        column_crosses,
        column_updates,
    ):
        """Rows that lie so many apart; ``row_sums`` is (3, rows), zeros."""
        _assume_no_overlap()
        for i in range(count):
            errors, crosses, updates = column_errors[i], column_crosses[i], column_updates[i]
            for row in range(rows):
                update = grad[row * grad_stride + i] * row_scale[row * apart] * column_scale[i]
                error = update * inverse_guess - exp_avg[row * exp_avg_stride + i]
                square, cross, update_square = error * error, update * error, update * update
                row_sums[row] += square
                row_sums[rows + row] += cross
                row_sums[2 * rows + row] += update_square
                errors += square
                crosses += cross
                updates += update_square
            column_errors[i], column_crosses[i], column_updates[i] = errors, crosses, updates

    return instability_rows


_one_row = _instability_rows(1)
_some_rows = _instability_rows(_ROWS_AT_ONCE)
_long_rows = _instability_rows(_LONG_ROWS_AT_ONCE)


@inline
def _lies_in_slice(param, tile):
    """Whether all of a tile's rows lie in the slice, from one end to the other."""
    first = tile[Tile.MATRIX] * param[Matrix.ROWS]
    starts = (first + tile[Tile.ROW]) * param[Matrix.COLUMNS] >= param[Matrix.START]
    return starts and (first + tile[Tile.STOP_ROW]) * param[Matrix.COLUMNS] <= param[Matrix.STOP]


@inline
def instability_tiles(
    first, stop, origin, matrices, tiles, divisors, scratch, tile_rows, tile_columns, buffers
):
    """Twin of ``passes.add_instability_sums``: the sums of e^2, u e and u^2 of each tile.

    Args as those of :func:`square_tiles`, and
        divisors: (matrices, 2), fp32: 1/d0, and 1/d which is not known yet.
    """
    width = tile_rows + tile_columns
    grads, momenta, row_sums, _ = buffers
    for index in range(first, stop):
        tile = tiles[index]
        param, matrix = matrices[tile[Tile.PARAM]], tile[Tile.MATRIX]
        slot = _slot(scratch, index - origin)
        rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
        _clear(slot, 3, width, tile_rows + min(tile_columns, columns))
        row_scale = param[Matrix.ROW_SCALE] + 4 * matrix * rows
        column_scale = param[Matrix.COLUMN_SCALE] + 4 * matrix * columns
        inverse_guess = divisors[param[Matrix.FIRST_MATRIX] + matrix, 0]
        row, stop_row = tile[Tile.ROW], tile[Tile.STOP_ROW]
        at_once = _LONG_ROWS_AT_ONCE if columns > _LONG_ROW else _ROWS_AT_ONCE
        apart = (stop_row - row) // at_once if _lies_in_slice(param, tile) else 0
        stop_together, next_alone = row + apart, row + at_once * apart
        while row < stop_row:
            together = at_once if row < stop_together else 1
            low, high, start = _row_in_slice(param, tile, row, tile_columns)
            if low < high:
                offset, count, column = low - param[Matrix.START], high - low, low - start
                stride = apart * columns
                grad, grad_stride = storage.gradients(param, offset, stride, together, count, grads)
                exp_avg, exp_avg_stride = storage.momenta(
                    param, offset, stride, together, count, momenta
                )
                column_sums = slot + 4 * (tile_rows + column)
                row_sums[: 3 * together] = 0.0
                args = (
                    to_float32(grad),
                    grad_stride,
                    to_float32(exp_avg),
                    exp_avg_stride,
                    count,
                    to_float32(row_scale + 4 * row),
                    to_float32(column_scale + 4 * (tile[Tile.COLUMN] + column)),
                    apart,
                    inverse_guess,
                    to_float32(row_sums.ctypes.data),
                    to_float32(column_sums),
                    to_float32(column_sums + 4 * width),
                    to_float32(column_sums + 8 * width),
                )
                if together == 1:
                    _one_row(*args)
                elif together == _ROWS_AT_ONCE:
                    _some_rows(*args)
                else:
                    _long_rows(*args)
                for kind in range(3):
                    for number in range(together):
                        place = kind * width + row - tile[Tile.ROW] + number * apart
                        floats(slot + 4 * place, 1)[0] = row_sums[kind * together + number]
            row = next_alone if row + 1 == stop_together else row + 1


@elementwise
def _add_sums(sums, factor, out):
    for i in range(out.size):
        out[i] += factor * np.float64(sums[i])


@inline
def _add_strip(strip, scratch, kind, factor, out):
    width = scratch.shape[2]
    for tile in range(strip[Strip.TILES]):
        slot = _slot(scratch, strip[Strip.SLOT] + tile * strip[Strip.STRIDE])
        sums = floats(slot + 4 * (kind * width + strip[Strip.WITHIN]), out.size)
        _add_sums(sums, factor, out)


@inline
def add_square_strips(first, stop, strips, scratch):
    """Add the tiles' sums of g^2 to the buffer of sums."""
    for index in range(first, stop):
        strip = strips[index]
        out = doubles(strip[Strip.SQUARES], strip[Strip.COUNT])
        _add_strip(strip, scratch, 0, SQUARE_UNSCALE, out)


@inline
def add_instability_strips(first, stop, strips, scratch):
    """Add the tiles' sums of e^2, u e and u^2 to the buffer of sums."""
    for index in range(first, stop):
        strip = strips[index]
        for kind in range(3):
            address = strip[Strip.RESIDUALS] + 8 * kind * strip[Strip.RESIDUALS_STRIDE]
            _add_strip(strip, scratch, kind, 1.0, doubles(address, strip[Strip.COUNT]))


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
    """What all elements of a parameter share: lr, beta1, 1 - beta1 and lr times decay, fp32."""
    group = groups[param[Matrix.GROUP]]
    lr, beta1 = group[Group.LR], group[Group.BETA1]
    return (
        np.float32(lr),
        np.float32(beta1),
        np.float32(1.0 - beta1),
        np.float32(lr * group[Group.WEIGHT_DECAY]),
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
    count, (lr, beta1, rest, decay) = momentum.size, rates
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
        storage.draw(full_place, param[Matrix.KEY], bits)


@inline
def apply_tiles(first, stop, matrices, tiles, groups, divisors, tile_columns, buffers):
    """Twin of ``passes.apply_update`` for matrices whose momentum is not int8.

    Args as those of :func:`instability_tiles`, with 1/d known.
    """
    grads, momenta, weights, bits = buffers
    for index in range(first, stop):
        tile = tiles[index]
        param, matrix = matrices[tile[Tile.PARAM]], tile[Tile.MATRIX]
        rates, inverse_divisor = _rates(param, groups), _inverse_divisor(param, divisors, matrix)
        for row in range(tile[Tile.ROW], tile[Tile.STOP_ROW]):
            low, high, start = _row_in_slice(param, tile, row, tile_columns)
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
        buffers: this thread's, see :func:`buffers_in`.
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
