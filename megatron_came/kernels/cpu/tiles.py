"""Passes 1 and 2 over tiles of matrices, and over the strips that add up the tiles' sums.

Every function takes the rows [first, stop) of one table, so that threads can share the work; what
is summed, and in which order, does not depend on their number.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from megatron_came.kernels.cpu import storage
from megatron_came.kernels.cpu.compiling import (
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    UPDATE_SCALE,
    UPDATE_UNSCALE,
    doubles,
    elementwise,
    fast,
    floats,
    inline,
    shorts,
    to_float32,
)
from megatron_came.kernels.triton.tables import MatrixField as Matrix
from megatron_came.kernels.triton.tables import StripField as Strip
from megatron_came.kernels.triton.tables import TileField as Tile

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
def buffers_in(address, count):
    """Divide a thread's room for what is not fp32 in memory.

    Args:
        address: of (4, count), fp32.
        count: elements, as many as :func:`room_elements` says.

    Returns:
        Gradients and momenta of a few rows, weights of one (in pass 2 sums of a few rows), fp32;
        random bits of one, uint16.
    """
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
def row_in_slice(param, tile, row, tile_columns):
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
        tile_rows: of the tallest tile.
        tile_columns: of a tile, at most.
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
            low, high, start = row_in_slice(param, tile, row, tile_columns)
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
        unscaled_guess = inverse_guess / UPDATE_SCALE
        for i in range(count):
            errors, crosses, updates = column_errors[i], column_crosses[i], column_updates[i]
            for row in range(rows):
                scale = row_scale[row * apart] * UPDATE_SCALE
                update = grad[row * grad_stride + i] * scale * column_scale[i]
                error = update * unscaled_guess - exp_avg[row * exp_avg_stride + i]
                error *= UPDATE_SCALE
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
            low, high, start = row_in_slice(param, tile, row, tile_columns)
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
            out = doubles(address, strip[Strip.COUNT])
            _add_strip(strip, scratch, kind, UPDATE_UNSCALE, out)
