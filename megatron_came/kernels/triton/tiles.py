"""The passes over matrices: tiles, blocks of int8 momentum, and additions of the tiles' sums.

A program takes one row of a table. Sums are written to places of their own and added up in a fixed
order, so that runs are bit-identical.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import storage, tables
from megatron_came.kernels.triton.compiling import (
    ADDITION_FIELDS,
    FAR,
    GROUP_FIELDS,
    MATRIX_FIELDS,
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    TILE_FIELDS,
    UPDATE_SCALE,
    UPDATE_UNSCALE,
    divisor_of,
    doubles,
    floats,
    full_places,
    kernel,
    momenta_of,
    note_tables,
    rates,
    scales_of,
    weights_of,
)


@triton.jit
def _tile(matrices, tiles, index, ALIGNED: tl.constexpr):
    """Geometry of a tile.

    Returns:
        The parameter's row; flat place of the tile's first element in the slice (before its start
        where negative); the place of the slice's start and stop relative to that; columns of the
        matrix; the tile's matrix, first row, stop row and first column.
    """
    note_tables()
    tile = tiles + index.to(tl.int64) * TILE_FIELDS
    param = matrices + tl.load(tile + tables.TileField.PARAM) * MATRIX_FIELDS
    matrix = tl.load(tile + tables.TileField.MATRIX)
    row = tl.load(tile + tables.TileField.ROW)
    stop_row = tl.load(tile + tables.TileField.STOP_ROW)
    column = tl.load(tile + tables.TileField.COLUMN)
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    start = tl.load(param + tables.MatrixField.START)
    stop = tl.load(param + tables.MatrixField.STOP)
    place = (matrix * rows + row) * columns + column - start
    low = tl.maximum(-place, 0).to(tl.int32)
    high = tl.minimum(stop - start - place, FAR).to(tl.int32)
    narrow = columns.to(tl.int32)
    if ALIGNED:
        place = tl.multiple_of(place, 4)
        low = tl.multiple_of(low, 4)
        high = tl.multiple_of(high, 4)
        narrow = tl.multiple_of(narrow, 4)
        column = tl.multiple_of(column, 4)
    return param, place, low, high, narrow, matrix, row, stop_row, column


@kernel
def square_tiles(
    from_row,
    matrices,
    tiles,
    scratch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Twin of ``passes.add_squared_sums``: the row and column sums of a tile.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``MatrixField``, int64.
        tiles: table of ``TileField``, int64.
        scratch: (tiles, 3, ROWS + COLUMNS), fp32, out; the first of the three is used.
        ROWS: of a tile.
        COLUMNS: of a tile.
        STEP: rows that a program reads at once.
        ALIGNED: whether addresses, widths and starts allow vector loads.
    """
    number = tl.program_id(0)
    param, place, low, high, width, _matrix, row, stop_row, column = _tile(
        matrices, tiles, number + from_row, ALIGNED
    )
    address = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    sums = scratch + number.to(tl.int64) * (3 * (ROWS + COLUMNS))
    steps = tl.arange(0, STEP)
    across = tl.arange(0, COLUMNS)
    inside = across < width - column.to(tl.int32)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    height = (stop_row - row).to(tl.int32)
    for first in range(0, height, STEP):
        down = first + steps
        offset = down[:, None] * width + across[None, :]
        mask = (down < height)[:, None] & inside[None, :]
        mask = mask & (offset >= low) & (offset < high)
        grad = storage.read(address, is_bf16, place + offset, mask, ALIGNED) * SQUARE_SCALE
        square = grad * grad
        tl.store(sums + down, tl.sum(square, 1))
        total += square
    tl.store(sums + ROWS + across, tl.sum(total, 0))


@kernel
def instability_tiles(
    from_row,
    matrices,
    tiles,
    divisors,
    scratch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Twin of ``passes.add_instability_sums``: the sums of e^2, u e and u^2 of a tile.

    Args as those of :func:`square_tiles`, and
        divisors: (matrices, 2), fp32: 1/d0, and 1/d which is not known yet.
    """
    # Backwards: what pass 1 has read last, and pass 3 will read first, is in the cache.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    param, place, low, high, width, matrix, row, stop_row, column = _tile(
        matrices, tiles, number + from_row, ALIGNED
    )
    grads = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    momenta, momenta_are_bf16, momentum_scales = momenta_of(param)
    rows = tl.load(param + tables.MatrixField.ROWS)
    row_scales = floats(tl.load(param + tables.MatrixField.ROW_SCALE)) + matrix * rows + row
    column_scales = floats(tl.load(param + tables.MatrixField.COLUMN_SCALE)) + matrix * width
    inverse_guess = tl.load(divisor_of(divisors, param, matrix, 0))
    sums = scratch + number.to(tl.int64) * (3 * (ROWS + COLUMNS))
    steps = tl.arange(0, STEP)
    across = tl.arange(0, COLUMNS)
    inside = across < width - column.to(tl.int32)
    column_scale = tl.load(column_scales + column + across, mask=inside, other=0.0)
    errors = tl.zeros((STEP, COLUMNS), tl.float32)
    crosses = tl.zeros((STEP, COLUMNS), tl.float32)
    updates = tl.zeros((STEP, COLUMNS), tl.float32)
    height = (stop_row - row).to(tl.int32)
    for first in range(0, height, STEP):
        down = first + steps
        in_rows = down < height
        offset = down[:, None] * width + across[None, :]
        mask = in_rows[:, None] & inside[None, :] & (offset >= low) & (offset < high)
        row_scale = tl.load(row_scales + down, mask=in_rows, other=0.0) * UPDATE_SCALE
        grad = storage.read(grads, is_bf16, place + offset, mask, ALIGNED)
        momentum = storage.momenta(
            momenta, momenta_are_bf16, momentum_scales, place + offset, mask, ALIGNED
        )
        update = grad * row_scale[:, None] * column_scale[None, :]
        error = (update * (inverse_guess / UPDATE_SCALE) - momentum) * UPDATE_SCALE
        square, cross, update_square = error * error, update * error, update * update
        tl.store(sums + down, tl.sum(square, 1))
        tl.store(sums + (ROWS + COLUMNS) + down, tl.sum(cross, 1))
        tl.store(sums + 2 * (ROWS + COLUMNS) + down, tl.sum(update_square, 1))
        errors += square
        crosses += cross
        updates += update_square
    tl.store(sums + ROWS + across, tl.sum(errors, 0))
    tl.store(sums + (ROWS + COLUMNS) + ROWS + across, tl.sum(crosses, 0))
    tl.store(sums + 2 * (ROWS + COLUMNS) + ROWS + across, tl.sum(updates, 0))


@kernel
def add_tile_sums(
    from_row,
    additions,
    scratch,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Add the tiles' sums of a addition to the buffers of sums.

    Args:
        from_row: what the first program takes of the table.
        additions: table of ``AdditionField``, int64.
        scratch: (tiles, 3, WIDTH), fp32.
        WIDTH: sums of a tile, of its rows and columns.
        TILES: read at once.
        COUNT: at least the sums of a addition.
        SQUARES: whether the sums are those of g^2.
    """
    addition = additions + (tl.program_id(0) + from_row).to(tl.int64) * ADDITION_FIELDS
    first_tile = tl.load(addition + tables.AdditionField.TILE)
    stride = tl.load(addition + tables.AdditionField.STRIDE)
    tiles = tl.load(addition + tables.AdditionField.TILES)
    within = tl.load(addition + tables.AdditionField.WITHIN)
    count = tl.load(addition + tables.AdditionField.COUNT)
    which = tl.program_id(1)  # of e^2, u e and u^2
    index = tl.arange(0, COUNT)
    inside = index < count
    below = tl.arange(0, TILES)
    total = tl.zeros((TILES, COUNT), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + below
        place = (first_tile + tile * stride) * (3 * WIDTH) + which * WIDTH + within
        mask = (tile < tiles)[:, None] & inside[None, :]
        values = tl.load(scratch + place[:, None] + index[None, :], mask=mask, other=0.0)
        total += values.to(tl.float64)
    sums = tl.sum(total, 0)
    if SQUARES:
        out = doubles(tl.load(addition + tables.AdditionField.SQUARES))
        sums = sums * SQUARE_UNSCALE
    else:
        out = doubles(tl.load(addition + tables.AdditionField.INSTABILITY))
        out += which * tl.load(addition + tables.AdditionField.INSTABILITY_STRIDE)
        sums = sums * UPDATE_UNSCALE
    before = tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, before + sums, mask=inside)


@kernel
def apply_tiles(
    from_row,
    matrices,
    tiles,
    groups,
    divisors,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Twin of ``passes.apply_update`` for matrices whose momentum is not int8.

    Args as those of :func:`instability_tiles`, but for ROWS and with 1/d known.
    """
    param, place, low, high, width, matrix, row, stop_row, column = _tile(
        matrices, tiles, tl.program_id(0) + from_row, ALIGNED
    )
    grads = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    momenta, momenta_are_bf16, _ = momenta_of(param)
    full_row, full_column, full_columns, part_rows, part_jump = full_places(
        param, matrix, row, column
    )
    weights, remainders, model, model_is_bf16 = weights_of(param)
    row_place = matrix * tl.load(param + tables.MatrixField.ROWS) + row
    row_scales, column_scales, row_confidences, column_confidences = scales_of(param)
    inverse_divisor = tl.load(divisor_of(divisors, param, matrix, 1))
    group = groups + tl.load(param + tables.MatrixField.GROUP) * GROUP_FIELDS
    beta1, rest, lr, decay = rates(group)
    key = storage.step_key(tl.load(param + tables.MatrixField.KEY), group)
    steps = tl.arange(0, STEP)
    across = tl.arange(0, COLUMNS)
    inside = across < width - column.to(tl.int32)
    columns = matrix * width + column + across
    column_scale = tl.load(column_scales + columns, mask=inside, other=0.0)
    column_confidence = tl.load(column_confidences + columns, mask=inside, other=0.0)
    height = (stop_row - row).to(tl.int32)
    for first in range(0, height, STEP):
        down = first + steps
        in_rows = down < height
        offset = down[:, None] * width + across[None, :]
        mask = in_rows[:, None] & inside[None, :] & (offset >= low) & (offset < high)
        row_scale = tl.load(row_scales + row_place + down, mask=in_rows, other=0.0)
        row_scale *= inverse_divisor
        row_confidence = tl.load(row_confidences + row_place + down, mask=in_rows, other=0.0) * lr
        grad = storage.read(grads, is_bf16, place + offset, mask, ALIGNED)
        momentum = storage.read(momenta, momenta_are_bf16, place + offset, mask, ALIGNED)
        weight = storage.weights(weights, remainders, place + offset, mask, ALIGNED)
        momentum = beta1 * momentum + rest * (grad * row_scale[:, None] * column_scale[None, :])
        full_down = full_row + down + (row + down) // part_rows * part_jump
        full_place = full_down[:, None] * full_columns + full_column + across[None, :]
        storage.store_momentum(
            momenta, momenta_are_bf16, place + offset, momentum, mask, full_place, key, ALIGNED
        )
        weight -= decay * weight
        weight -= row_confidence[:, None] * (momentum * column_confidence[None, :])
        storage.store_weights(weights, remainders, place + offset, weight, mask, ALIGNED)
        if model != 0:
            storage.store_short(model, model_is_bf16, place + offset, weight, mask, ALIGNED)
