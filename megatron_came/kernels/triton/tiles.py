"""The passes over matrices: tiles, and additions of the tiles' sums.

A program takes one row of a table, and is compiled for a ``tables.Kind``. Each of its warps reads a
row of the tile at a time, of 256 columns in parts of 128: tensors have a line for each part of each
row, first those of all rows' first parts. So rows are summed within a warp, and columns in its
registers until the tile's end, before which no warp waits for another. Sums are written to places
of their own and added up in a fixed order, so that runs are bit-identical.
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
    INT8_BLOCK,
    PARAM_FIELDS,
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    TILE_FIELDS,
    UPDATE_SCALE,
    UPDATE_UNSCALE,
    addresses_of,
    divisor_of,
    doubles,
    floats,
    full_place_of,
    kernel,
    note_tables,
    over_lines,
    rates,
    scales_of,
)


@triton.jit
def _tile(matrices, tiles, index, COLUMNS: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr):
    """Geometry of a tile.

    Returns:
        The parameter's row; the tile's matrix, first row, first column and rows; flat place of its
        first element in the slice (before its start where negative); the place of the slice's start
        relative to that, and how many elements follow it, of this tile's rows; columns of the
        matrix; those of the elements that are read at once; where the tile's sums are in the
        scratch buffer.
    """
    note_tables()
    tile = tiles + index.to(tl.int64) * TILE_FIELDS
    param = matrices + tl.load(tile + tables.TileField.PARAM) * PARAM_FIELDS
    matrix = tl.load(tile + tables.TileField.MATRIX)
    row = tl.load(tile + tables.TileField.ROW)
    height = tl.load(tile + tables.TileField.STOP_ROW) - row
    column = tl.load(tile + tables.TileField.COLUMN)
    columns = tl.load(param + tables.ParamField.COLUMNS)
    start = tl.load(param + tables.ParamField.START)
    stop = tl.load(param + tables.ParamField.STOP)
    place = (matrix * tl.load(param + tables.ParamField.ROWS) + row) * columns + column - start
    low = tl.maximum(-place, 0)
    high = tl.minimum(tl.minimum(stop - start - place, height * columns - column), FAR)
    size = tl.maximum(high - low, 0).to(tl.int32)
    low = low.to(tl.int32)
    width = columns.to(tl.int32)
    if ALIGNED:
        place = tl.multiple_of(place, 4)
        low = tl.multiple_of(low, 4)
        size = tl.multiple_of(size, 4)
        width = tl.multiple_of(width, 4)
        column = tl.multiple_of(column, 4)
    # A lane takes four columns of each part, or one.
    WIDEST: tl.constexpr = 128 if ALIGNED else 32
    ACROSS: tl.constexpr = COLUMNS if COLUMNS < WIDEST else WIDEST
    parts = tl.arange(0, COLUMNS // ACROSS * STEP) // STEP * ACROSS
    across = parts[:, None] + tl.arange(0, ACROSS)[None, :]
    sums = tl.multiple_of(tl.load(tile + tables.TileField.SUMS), 4)
    height = height.to(tl.int32)
    return param, matrix, row, column, height, place, low, size, width, across, sums


@triton.jit
def _offsets(first, across, left, width, low, size, STEP: tl.constexpr):
    """Offsets of rows from a tile's first element, and which of these elements are the slice's."""
    lanes = tl.arange(0, across.shape[1])[None, :]
    parts = across - lanes
    begin = (first + tl.arange(0, across.shape[0]) % STEP)[:, None] * width + lanes
    after = (begin + (parts - low)).to(tl.uint32)  # before the start it is large
    # In 64 bits, so that the parts have one address, and constants beside it.
    offset = begin.to(tl.int64) + parts.to(tl.int64)
    return offset, (across < left) & (after < size.to(tl.uint32))


@triton.jit
def _by_rows(values, STEP: tl.constexpr):
    """As (parts, rows, elements of a part), which moves nothing."""
    return tl.reshape(values, (values.shape[0] // STEP, STEP, values.shape[1]))


@triton.jit
def _row_sums(values, STEP: tl.constexpr):
    return tl.sum(tl.sum(_by_rows(values, STEP), 0), 1)[:, None]


@triton.jit
def _store_row_sums(sums, down, height, first, second, third, STEP: tl.constexpr):
    """Add three numbers over the columns, and write the sums from a lane of the warp that has them.

    Of the shape of a part, they are stored from the registers that hold them: of the shape of a
    column, they would go through shared memory, behind a barrier.
    """
    kind = tl.arange(0, first.shape[1])[None, :]
    values = tl.where(kind == 1, _row_sums(second, STEP), _row_sums(third, STEP))
    values = tl.where(kind == 0, _row_sums(first, STEP), values)
    mask = (down < height)[:, None] & (kind < 4)
    tl.store(sums + 4 * down[:, None] + kind, values, mask=mask)


@triton.jit
def _store_column_sums(sums, values, STEP: tl.constexpr):
    """Add numbers over the rows, and write the sums."""
    parts = tl.arange(0, values.shape[0] // STEP)[:, None] * values.shape[1]
    columns = parts + tl.arange(0, values.shape[1])[None, :]
    tl.store(sums + 4 * columns, tl.sum(_by_rows(values, STEP), 1))


@kernel
def square_tiles(
    from_row, matrices, tiles, scratch, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_IS_BF16: tl.constexpr,
):  # fmt: skip
    """Twin of ``passes.add_squared_sums``: the row and column sums of a tile.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``ParamField``, int64.
        tiles: table of ``TileField``, int64.
        scratch: (sums of tiles, 4), fp32, out: a tile's columns and then its rows; the first of
            the four is used.
        COLUMNS: of a tile.
        STEP: rows that a program reads at once.
        ALIGNED: see ``tables.Kind``.
        GRAD_IS_BF16: likewise; so are further flags of kernels.
    """
    param, _m, _row, column, height, place, low, size, width, across, sums = _tile(
        matrices, tiles, tl.program_id(0) + from_row, COLUMNS, STEP, ALIGNED
    )
    grads = tl.load(param + tables.ParamField.GRAD)
    left = width - column.to(tl.int32)
    sums = scratch + sums
    total = tl.zeros(across.shape, tl.float32)
    for first in range(0, height, STEP):
        down = first + tl.arange(0, STEP)
        offset, mask = _offsets(first, across, left, width, low, size, STEP)
        grad = storage.read(grads, GRAD_IS_BF16, place, offset, mask, ALIGNED) * SQUARE_SCALE
        square = grad * grad
        total += square
        _store_row_sums(sums + 4 * COLUMNS, down, height, square, square, square, STEP)
    _store_column_sums(sums, total, STEP)


@triton.jit
def _read_momentum(
    address, scales, place, offset, mask, down, across, low, size, width, left, factor,
    COLUMNS: tl.constexpr, INT8: tl.constexpr, IS_BF16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Read momentum, times a factor. A row of a tile crosses the end of one int8 block at most."""
    if INT8 == 0:
        return storage.read(address, IS_BF16, place, offset, mask, ALIGNED) * factor
    scales = floats(scales) + (place >> 8)
    small = storage.read_int8(address, place, offset, mask, ALIGNED)
    # Relative to the tile's first element: where a row begins, and where its first block ends.
    begins = down * width
    after = begins + (place & (INT8_BLOCK - 1)).to(tl.int32)
    rest = INT8_BLOCK - (after & (INT8_BLOCK - 1))
    ends = begins + rest
    block = after >> 8
    is_there = (begins < low + size) & (ends > low)
    own = tl.load(scales + block, mask=is_there, other=0.0) * factor
    if INT8 == 1:
        return small * over_lines(own, small)
    crosses = (rest < tl.minimum(COLUMNS, left)) & (ends < low + size)
    other = tl.load(scales + block + 1, mask=crosses & (ends + INT8_BLOCK > low), other=0.0)
    SHIFT: tl.constexpr = 2 if ALIGNED else 0  # four elements have the same
    is_own = (across >> SHIFT) < over_lines(rest >> SHIFT, small)
    return small * tl.where(is_own, over_lines(own, small), over_lines(other * factor, small))


@kernel
def instability_tiles(
    from_row, matrices, tiles, divisors, scratch, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_IS_BF16: tl.constexpr, EXP_AVG_IS_BF16: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """Twin of ``passes.add_instability_sums``: the sums of e^2, u e and u^2 of a tile.

    Args as those of :func:`square_tiles`, and
        divisors: (matrices, 2), fp32: 1/d0, and 1/d which is not known yet.
    """
    # Backwards: what pass 1 has read last, and pass 3 will read first, is in the cache.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    param, matrix, row, column, height, place, low, size, width, across, sums = _tile(
        matrices, tiles, number + from_row, COLUMNS, STEP, ALIGNED
    )
    grads, momenta, scales, _weights, _remainders, _model = addresses_of(param)
    row_scales, column_scales, _confidences, _column_confidences = scales_of(param, matrix)
    inverse_guess = tl.load(divisor_of(divisors, param, matrix, 0))
    left = width - column.to(tl.int32)
    column_scale = tl.load(column_scales + column + across, mask=across < left, other=0.0)
    sums = scratch + sums
    errors = tl.zeros(across.shape, tl.float32)
    crosses = tl.zeros(across.shape, tl.float32)
    updates = tl.zeros(across.shape, tl.float32)
    for first in range(0, height, STEP):
        down = first + tl.arange(0, STEP)
        offset, mask = _offsets(first, across, left, width, low, size, STEP)
        row_scale = tl.load(row_scales + row + down, mask=down < height, other=0.0) * UPDATE_SCALE
        grad = storage.read(grads, GRAD_IS_BF16, place, offset, mask, ALIGNED)
        momentum = _read_momentum(
            momenta, scales, place, offset, mask, down, across, low, size, width, left,
            UPDATE_SCALE, COLUMNS, INT8, EXP_AVG_IS_BF16, ALIGNED,
        )  # fmt: skip
        update = grad * over_lines(row_scale, grad) * column_scale
        error = update * inverse_guess - momentum
        square, cross, update_square = error * error, update * error, update * update
        errors += square
        crosses += cross
        updates += update_square
        _store_row_sums(sums + 4 * COLUMNS, down, height, square, cross, update_square, STEP)
    _store_column_sums(sums, errors, STEP)
    _store_column_sums(sums + 1, crosses, STEP)
    _store_column_sums(sums + 2, updates, STEP)


@kernel
def add_tile_sums(
    from_row, additions, scratch, TILES: tl.constexpr, COUNT: tl.constexpr, SQUARES: tl.constexpr
):
    """Add the tiles' sums of an addition to the buffers of sums.

    Args:
        from_row: what the first program takes of the table.
        additions: table of ``AdditionField``, int64.
        scratch: (sums of tiles, 4), fp32.
        TILES: read at once.
        COUNT: at least the sums of an addition.
        SQUARES: whether the sums are those of g^2.
    """
    addition = additions + (tl.program_id(0) + from_row).to(tl.int64) * ADDITION_FIELDS
    scratch += tl.load(addition + tables.AdditionField.SUMS)
    stride = tl.load(addition + tables.AdditionField.STRIDE)
    tiles = tl.load(addition + tables.AdditionField.TILES)
    count = tl.load(addition + tables.AdditionField.COUNT)
    which = tl.program_id(1)  # of e^2, u e and u^2
    index = tl.arange(0, COUNT)
    inside = index < count
    total = tl.zeros((TILES, COUNT), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        place = (tile * stride)[:, None] + 4 * index[None, :] + which
        mask = (tile < tiles)[:, None] & inside[None, :]
        total += tl.load(scratch + place, mask=mask, other=0.0).to(tl.float64)
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


@triton.jit
def _random_bits(full_place, down, full_columns, across, key, ALIGNED: tl.constexpr):
    """Random bits of a tile's elements, whose first is at a place of the full tensor."""
    SHIFT: tl.constexpr = 2 if ALIGNED else 0  # four elements have most of the sum in common
    begin = over_lines(full_place + down.to(tl.int64) * full_columns, across)
    origin = ((begin >> SHIFT) << SHIFT) + ((across >> SHIFT) << SHIFT)
    return storage.random_bits(origin, across & (2**SHIFT - 1), key)


@kernel
def apply_tiles(
    from_row, matrices, tiles, groups, divisors, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_IS_BF16: tl.constexpr, EXP_AVG_IS_BF16: tl.constexpr,
    INT8: tl.constexpr, HAS_REMAINDER: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Twin of ``passes.apply_update``; int8 momentum only where its blocks are rows of tiles.

    Args as those of :func:`instability_tiles`, but with 1/d known.
    """
    param, matrix, row, column, height, place, low, size, width, across, _sums = _tile(
        matrices, tiles, tl.program_id(0) + from_row, COLUMNS, STEP, ALIGNED
    )
    grads, momenta, scales, weights, remainders, model = addresses_of(param)
    row_scales, column_scales, row_confidences, column_confidences = scales_of(param, matrix)
    inverse_divisor = tl.load(divisor_of(divisors, param, matrix, 1))
    group = groups + tl.load(param + tables.ParamField.GROUP) * GROUP_FIELDS
    beta1, rest, lr, decay = rates(group)
    key = storage.step_key(tl.load(param + tables.ParamField.KEY), group)
    full_place, full_columns = full_place_of(param, matrix, row, column)
    left = width - column.to(tl.int32)
    column_scale = tl.load(column_scales + column + across, mask=across < left, other=0.0)
    column_confidence = tl.load(column_confidences + column + across, mask=across < left, other=0.0)
    for first in range(0, height, STEP):
        down = first + tl.arange(0, STEP)
        offset, mask = _offsets(first, across, left, width, low, size, STEP)
        in_rows = down < height
        row_scale = tl.load(row_scales + row + down, mask=in_rows, other=0.0) * inverse_divisor
        row_confidence = tl.load(row_confidences + row + down, mask=in_rows, other=0.0) * lr
        grad = storage.read(grads, GRAD_IS_BF16, place, offset, mask, ALIGNED)
        weight = storage.read_weights(
            weights, remainders, HAS_REMAINDER, place, offset, mask, ALIGNED
        )
        momentum = _read_momentum(
            momenta, scales, place, offset, mask, down, across, low, size, width, left, beta1,
            COLUMNS, INT8, EXP_AVG_IS_BF16, ALIGNED,
        )  # fmt: skip
        momentum += rest * (grad * over_lines(row_scale, grad) * column_scale)
        begins = down * width
        storage.store_momentum(
            momenta, scales, EXP_AVG_IS_BF16, INT8, (place >> 8) + (begins >> 8),
            (begins < low + size) & (begins + INT8_BLOCK > low), place, offset, momentum, mask,
            _random_bits(full_place, down, full_columns, across, key, ALIGNED), ALIGNED,
        )  # fmt: skip
        weight -= decay * weight
        weight -= over_lines(row_confidence, weight) * (momentum * column_confidence)
        storage.store_weights(
            weights, remainders, model, HAS_REMAINDER, MODEL, MODEL == 1, place, offset, weight,
            mask, ALIGNED,
        )  # fmt: skip
