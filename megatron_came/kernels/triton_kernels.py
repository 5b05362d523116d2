"""The passes on GPUs, in Triton: every kernel is one launch for all parameters of a chunk.

A program takes one row of a table: a tile, a strip, a matrix or a vector. Sums are written to
places of their own and added up in a fixed order, so that runs are bit-identical. The twins of
these kernels are the functions of ``megatron_came.maths``; arithmetic on elements is fp32, on sums
float64. All are in place and none is autotuned.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from megatron_came.kernels import tables
from megatron_came.maths import int8

_SQUARE_SCALE = tl.constexpr(2.0**-10)  # see megatron_came.maths.passes
_SQUARE_UNSCALE = tl.constexpr(2.0**20)
_INT8_BLOCK = tl.constexpr(int8.BLOCK)
_MATRIX_FIELDS = tl.constexpr(len(tables.MatrixField))
_VECTOR_FIELDS = tl.constexpr(len(tables.VectorField))
_TILE_FIELDS = tl.constexpr(len(tables.TileField))
_STRIP_FIELDS = tl.constexpr(len(tables.StripField))
_SPAN_FIELDS = tl.constexpr(len(tables.SpanField))
_FINGERPRINT = tl.constexpr(tables.FINGERPRINT)
_GROUP_FIELDS = tl.constexpr(len(tables.GroupField))


# A number that changes from launch to launch must not be compiled into a kernel.
_kernel = partial(triton.jit, do_not_specialize=["from_row"])


@triton.jit
def _note_tables():
    """Make kernels depend on the tables' columns.

    Triton's cache knows a kernel by its source and its constants; the columns are in another file.
    """
    tl.static_assert(_FINGERPRINT >= 0)


@triton.jit
def _floats(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _aligned_floats(address, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:  # here, because a hint on the result of a call is lost
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _at_least(value, low):
    """``torch.clamp(min=low)``: NaN stays NaN, which ``tl.maximum`` drops."""
    return tl.where(value < low, low, value)


@triton.jit
def _doubles(address):
    _note_tables()
    return address.to(tl.pointer_type(tl.float64))


@triton.jit
def _elements(address, is_bf16, index, mask, ALIGNED: tl.constexpr):
    """Read elements of a gradient or momentum in fp32."""
    if is_bf16 != 0:
        short = address.to(tl.pointer_type(tl.bfloat16))
        if ALIGNED:
            short = tl.multiple_of(short, 8)
        values = tl.load(short + index, mask=mask, other=0.0).to(tl.float32)
    else:
        full = _aligned_floats(address, ALIGNED)
        values = tl.load(full + index, mask=mask, other=0.0)
    return values


@triton.jit
def _store_short(address, is_bf16, index, values, mask, ALIGNED: tl.constexpr):
    """Write 16-bit model weights, rounded to nearest even."""
    if is_bf16 != 0:
        # Rounded by hand, since the interpreter cuts bits off.
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values == values, rounded, 0x7FC0)
        brains = address.to(tl.pointer_type(tl.uint16))
        if ALIGNED:
            brains = tl.multiple_of(brains, 8)
        tl.store(brains + index, rounded.to(tl.uint16), mask=mask)
    else:
        halves = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            halves = tl.multiple_of(halves, 8)
        tl.store(halves + index, values.to(tl.float16), mask=mask)


@triton.jit
def _momenta(address, is_bf16, scales, index, mask, ALIGNED: tl.constexpr):
    """Read elements of the momentum in fp32."""
    if scales != 0:
        small = tl.load(address.to(tl.pointer_type(tl.int8)) + index, mask=mask, other=0)
        scale = tl.load(_floats(scales) + index // _INT8_BLOCK, mask=mask, other=0.0)
        values = small.to(tl.float32) * scale
    else:
        values = _elements(address, is_bf16, index, mask, ALIGNED)
    return values


@triton.jit
def _random_bits(place, key):
    """Twin of ``rounding.random_bits``, as uint32."""
    mixed = place.to(tl.uint32) * 0x9E3779B1 + (place >> 32).to(tl.uint32) * 0x27D4EB2F
    mixed += key.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    return (mixed ^ (mixed >> 16)) & 0xFFFF


@triton.jit
def _store_momentum(address, is_bf16, index, values, mask, place, key, ALIGNED: tl.constexpr):
    """Write momentum; to bf16 as ``rounding.to_bf16`` rounds."""
    if is_bf16 != 0:
        bits = values.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        special = tl.where((bits & 0x7FFFFF) != 0, bits | 0x10000, bits)
        rounded = tl.where(finite, bits + _random_bits(place, key), special) >> 16
        brains = address.to(tl.pointer_type(tl.uint16))
        if ALIGNED:
            brains = tl.multiple_of(brains, 8)
        tl.store(brains + index, rounded.to(tl.uint16), mask=mask)
    else:
        tl.store(_aligned_floats(address, ALIGNED) + index, values, mask=mask)


@triton.jit
def _store_int8(address, scales, block, index, values, mask, place, key):
    """Write momentum as ``int8.quantize`` rounds.

    Args:
        address: of the momentum.
        scales: address of its scales.
        block: (blocks,), places of the blocks' scales.
        index: (blocks, 256), places of the elements.
        values: likewise, fp32.
        mask: likewise.
        place: likewise, in the full tensor.
        key: of the random bits.
    """
    absolute = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.where(mask, absolute, 0), 1)
    exponent = tl.maximum(((largest + 0x1FFFF) >> 23) - 6, 1)
    finite = largest < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    dither = (_random_bits(place, key).to(tl.float32) + 0.5) * 0.0000152587890625
    rounded = tl.floor(values * inverse[:, None] + dither)
    rounded = tl.where(finite[:, None], rounded, 0.0).to(tl.int32).to(tl.int8)
    tl.store(address.to(tl.pointer_type(tl.int8)) + index, rounded, mask=mask)
    tl.store(_floats(scales) + block, scale, mask=tl.max(mask.to(tl.int32), 1) != 0)


@triton.jit
def _weights(address, remainders, index, mask, ALIGNED: tl.constexpr):
    """Read fp32 weights, in one piece or two (``remainders.join``)."""
    if remainders != 0:
        upper = address.to(tl.pointer_type(tl.int16))
        lower = remainders.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            upper = tl.multiple_of(upper, 8)
            lower = tl.multiple_of(lower, 8)
        high = tl.load(upper + index, mask=mask, other=0).to(tl.int32) << 16
        low = tl.load(lower + index, mask=mask, other=0).to(tl.int32)
        values = (high + low).to(tl.float32, bitcast=True)
    else:
        values = tl.load(_aligned_floats(address, ALIGNED) + index, mask=mask, other=0.0)
    return values


@triton.jit
def _store_weights(address, remainders, index, values, mask, ALIGNED: tl.constexpr):
    """Write fp32 weights, in one piece or two (``remainders.split``)."""
    if remainders != 0:
        upper = address.to(tl.pointer_type(tl.int16))
        lower = remainders.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            upper = tl.multiple_of(upper, 8)
            lower = tl.multiple_of(lower, 8)
        whole = values.to(tl.int32, bitcast=True)
        whole = tl.where(values == values, whole, 0x7FC00000)
        low = (whole << 16) >> 16
        tl.store(upper + index, ((whole - low) >> 16).to(tl.int16), mask=mask)
        tl.store(lower + index, low.to(tl.int16), mask=mask)
    else:
        tl.store(_aligned_floats(address, ALIGNED) + index, values, mask=mask)


@triton.jit
def _tile(matrices, tiles, index, ALIGNED: tl.constexpr):
    """Geometry of a tile.

    Returns:
        The parameter's row; flat place of the tile's first element in the slice (before its start
        where negative); the place of the slice's start and stop relative to that; columns of the
        matrix; the tile's matrix, first row, stop row and first column.
    """
    _note_tables()
    tile = tiles + index.to(tl.int64) * _TILE_FIELDS
    param = matrices + tl.load(tile + tables.TileField.PARAM) * _MATRIX_FIELDS
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
    high = tl.minimum(stop - start - place, 2147483648 - 65536).to(tl.int32)
    narrow = columns.to(tl.int32)
    if ALIGNED:
        place = tl.multiple_of(place, 4)
        low = tl.multiple_of(low, 4)
        high = tl.multiple_of(high, 4)
        narrow = tl.multiple_of(narrow, 4)
        column = tl.multiple_of(column, 4)
    return param, place, low, high, narrow, matrix, row, stop_row, column


@_kernel
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
    """Twin of ``passes.add_squared_sums``: the row and column sums of a tile, to its slot.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``MatrixField``, int64.
        tiles: table of ``TileField``, int64.
        scratch: (slots, 3, ROWS + COLUMNS), fp32, out; the first of the three is used.
        ROWS: of a tile.
        COLUMNS: of a tile.
        STEP: rows that a program reads at once.
        ALIGNED: whether addresses, widths and starts allow vector loads.
    """
    slot = tl.program_id(0)
    param, place, low, high, width, _matrix, row, stop_row, column = _tile(
        matrices, tiles, slot + from_row, ALIGNED
    )
    address = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    sums = scratch + slot.to(tl.int64) * (3 * (ROWS + COLUMNS))
    steps = tl.arange(0, STEP)
    across = tl.arange(0, COLUMNS)
    inside = across < width - column.to(tl.int32)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for first in range(0, ROWS, STEP):
        down = first + steps
        offset = down[:, None] * width + across[None, :]
        mask = (down < (stop_row - row))[:, None] & inside[None, :]
        mask = mask & (offset >= low) & (offset < high)
        grad = _elements(address, is_bf16, place + offset, mask, ALIGNED) * _SQUARE_SCALE
        square = grad * grad
        tl.store(sums + down, tl.sum(square, 1))
        total += square
    tl.store(sums + ROWS + across, tl.sum(total, 0))


@_kernel
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
    slot = tl.program_id(0)
    param, place, low, high, width, matrix, row, stop_row, column = _tile(
        matrices, tiles, slot + from_row, ALIGNED
    )
    grads = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    momenta = tl.load(param + tables.MatrixField.EXP_AVG)
    momenta_are_bf16 = tl.load(param + tables.MatrixField.EXP_AVG_IS_BF16)
    momentum_scales = tl.load(param + tables.MatrixField.EXP_AVG_SCALE)
    rows = tl.load(param + tables.MatrixField.ROWS)
    row_scales = _floats(tl.load(param + tables.MatrixField.ROW_SCALE)) + matrix * rows + row
    column_scales = _floats(tl.load(param + tables.MatrixField.COLUMN_SCALE)) + matrix * width
    first_matrix = tl.load(param + tables.MatrixField.FIRST_MATRIX)
    inverse_guess = tl.load(divisors + 2 * (first_matrix + matrix))
    sums = scratch + slot.to(tl.int64) * (3 * (ROWS + COLUMNS))
    steps = tl.arange(0, STEP)
    across = tl.arange(0, COLUMNS)
    inside = across < width - column.to(tl.int32)
    column_scale = tl.load(column_scales + column + across, mask=inside, other=0.0)
    errors = tl.zeros((STEP, COLUMNS), tl.float32)
    crosses = tl.zeros((STEP, COLUMNS), tl.float32)
    updates = tl.zeros((STEP, COLUMNS), tl.float32)
    for first in range(0, ROWS, STEP):
        down = first + steps
        in_rows = down < (stop_row - row)
        offset = down[:, None] * width + across[None, :]
        mask = in_rows[:, None] & inside[None, :] & (offset >= low) & (offset < high)
        row_scale = tl.load(row_scales + down, mask=in_rows, other=0.0)
        grad = _elements(grads, is_bf16, place + offset, mask, ALIGNED)
        momentum = _momenta(
            momenta, momenta_are_bf16, momentum_scales, place + offset, mask, ALIGNED
        )
        update = grad * row_scale[:, None] * column_scale[None, :]
        error = update * inverse_guess - momentum
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


@_kernel
def add_strips(
    from_row,
    strips,
    scratch,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Add the tiles' sums of a strip to the buffers of sums.

    Args:
        from_row: what the first program takes of the table.
        strips: table of ``StripField``, int64.
        scratch: (slots, 3, WIDTH), fp32.
        WIDTH: of a slot's sums: rows and columns of a tile.
        TILES: read at once.
        COUNT: at least the sums of a strip.
        SQUARES: whether the sums are those of g^2.
    """
    strip = strips + (tl.program_id(0) + from_row).to(tl.int64) * _STRIP_FIELDS
    slot = tl.load(strip + tables.StripField.SLOT)
    stride = tl.load(strip + tables.StripField.STRIDE)
    tiles = tl.load(strip + tables.StripField.TILES)
    within = tl.load(strip + tables.StripField.WITHIN)
    count = tl.load(strip + tables.StripField.COUNT)
    which = tl.program_id(1)  # of e^2, u e and u^2
    index = tl.arange(0, COUNT)
    inside = index < count
    below = tl.arange(0, TILES)
    total = tl.zeros((TILES, COUNT), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + below
        place = (slot + tile * stride) * (3 * WIDTH) + which * WIDTH + within
        mask = (tile < tiles)[:, None] & inside[None, :]
        values = tl.load(scratch + place[:, None] + index[None, :], mask=mask, other=0.0)
        total += values.to(tl.float64)
    sums = tl.sum(total, 0)
    if SQUARES:
        out = _doubles(tl.load(strip + tables.StripField.SQUARES))
        sums = sums * _SQUARE_UNSCALE
    else:
        out = _doubles(tl.load(strip + tables.StripField.RESIDUALS))
        out += which * tl.load(strip + tables.StripField.RESIDUALS_STRIDE)
    before = tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, before + sums, mask=inside)


@triton.jit
def _update_moment(moment, sums, size, count, eps, beta, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment``; returns the moment's sum, and that of the mean over it."""
    total = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    keep = beta.to(tl.float32)
    add = (1.0 - beta).to(tl.float32)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        mean = tl.load(sums + index, mask=mask, other=0.0) / count + eps
        old = tl.load(moment + index, mask=mask, other=0.0)
        new = keep * old + add * mean.to(tl.float32)
        tl.store(moment + index, new, mask=mask)
        wide = new.to(tl.float64)
        total += tl.where(mask, wide, 0.0)
        ratio += tl.where(mask, mean / wide, 0.0)
    return tl.sum(total, 0), tl.sum(ratio, 0)


@triton.jit
def _inverse_roots(moment, mean, out, size, BLOCK: tl.constexpr):
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        values = tl.load(moment + index, mask=mask, other=1.0)
        tl.store(out + index, 1.0 / tl.sqrt_rn(values / mean), mask=mask)


@triton.jit
def _factor(factors, index, matrices):
    """The parameter's row, and the place in its batch, of a row of ``factors``."""
    param = matrices + tl.load(factors + 2 * index) * _MATRIX_FIELDS
    return param, tl.load(factors + 2 * index + 1)


@triton.jit
def _mean(param, row_total, column_total):
    """mean(r) = mean(c) of the full matrix, from the factor that this rank holds whole."""
    if tl.load(param + tables.MatrixField.ROWS_ARE_WHOLE) != 0:
        mean = row_total / tl.load(param + tables.MatrixField.ROWS)
    else:
        mean = column_total / tl.load(param + tables.MatrixField.COLUMNS)
    return mean.to(tl.float32)


@_kernel
def update_second_moments(from_row, matrices, factors, groups, divisors, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment``, ``scales`` and ``guessed_divisor`` (of each matrix).

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``MatrixField``, int64.
        factors: (matrices, 2), int64: matrix parameter, place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32, out: 1/d0.
        BLOCK: elements of a factor that a program reads at once.
    """
    index = tl.program_id(0) + from_row
    param, matrix = _factor(factors, index, matrices)
    group = groups + tl.load(param + tables.MatrixField.GROUP) * _GROUP_FIELDS
    eps = tl.load(group + tables.GroupField.EPS1)
    beta = tl.load(group + tables.GroupField.BETA2)
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    row = _floats(tl.load(param + tables.MatrixField.ROW)) + matrix * rows
    column = _floats(tl.load(param + tables.MatrixField.COLUMN)) + matrix * columns
    row_total, row_ratio = _update_moment(
        row,
        _doubles(tl.load(param + tables.MatrixField.SQUARE_ROWS)) + matrix * rows,
        rows,
        tl.load(param + tables.MatrixField.FULL_COLUMNS),
        eps,
        beta,
        BLOCK,
    )
    column_total, column_ratio = _update_moment(
        column,
        _doubles(tl.load(param + tables.MatrixField.SQUARE_COLUMNS)) + matrix * columns,
        columns,
        tl.load(param + tables.MatrixField.FULL_ROWS),
        eps,
        beta,
        BLOCK,
    )
    tl.debug_barrier()  # the moments are read again
    mean = _mean(param, row_total, column_total)
    row_scale = _floats(tl.load(param + tables.MatrixField.ROW_SCALE)) + matrix * rows
    column_scale = _floats(tl.load(param + tables.MatrixField.COLUMN_SCALE)) + matrix * columns
    _inverse_roots(row, mean, row_scale, rows, BLOCK)
    _inverse_roots(column, 1.0, column_scale, columns, BLOCK)
    from_rows = tl.where(
        tl.load(param + tables.MatrixField.ROWS_ARE_WHOLE) != 0, row_ratio / rows, 0.0
    )
    from_columns = tl.where(
        tl.load(param + tables.MatrixField.COLUMNS_ARE_WHOLE) != 0, column_ratio / columns, 0.0
    )
    clip = tl.load(group + tables.GroupField.CLIP_THRESHOLD)
    squared = _at_least(from_columns, from_rows)
    guess = _at_least(tl.sqrt(squared) / clip, 1.0)
    tl.store(divisors + 2 * index, (1.0 / guess).to(tl.float32))


@_kernel
def total_updates(from_row, matrices, BLOCK: tl.constexpr):
    """Sum u^2 over this rank's part of a matrix parameter, from its row sums."""
    param = matrices + (tl.program_id(0) + from_row).to(tl.int64) * _MATRIX_FIELDS
    count = tl.load(param + tables.MatrixField.BATCH) * tl.load(param + tables.MatrixField.ROWS)
    sums = _doubles(tl.load(param + tables.MatrixField.RESIDUAL_ROWS)) + 2 * count
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(sums + index, mask=index < count, other=0.0)
    tl.store(_doubles(tl.load(param + tables.MatrixField.TOTAL)), tl.sum(total, 0))


@triton.jit
def _inverse_divisor(total, numel, clip_threshold):
    """Twin of ``factors.clip_divisor``, of which it returns the inverse, in float64."""
    return 1.0 / _at_least(tl.sqrt(total / numel) / clip_threshold, 1.0)


@triton.jit
def _update_residual(
    moment, sums, stride, size, delta, beta1, count, eps, beta, BLOCK: tl.constexpr
):
    """Twin of ``factors.true_residuals`` and ``update_moment``; returns the moment's sum."""
    total = tl.zeros((BLOCK,), tl.float64)
    keep = beta.to(tl.float32)
    add = (1.0 - beta).to(tl.float32)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        error = tl.load(sums + index, mask=mask, other=0.0)
        cross = tl.load(sums + stride + index, mask=mask, other=0.0)
        square = tl.load(sums + 2 * stride + index, mask=mask, other=0.0)
        residual = error + delta * (2.0 * cross + delta * square)
        residual = _at_least(residual, 0.0) * beta1 * beta1
        old = tl.load(moment + index, mask=mask, other=0.0)
        new = keep * old + add * (residual / count + eps).to(tl.float32)
        tl.store(moment + index, new, mask=mask)
        total += tl.where(mask, new.to(tl.float64), 0.0)
    return tl.sum(total, 0)


@_kernel
def update_instabilities(from_row, matrices, factors, groups, divisors, BLOCK: tl.constexpr):
    """Twin of ``factors.clip_divisor``, ``true_residuals``, ``update_moment`` and ``scales``.

    Args as those of :func:`update_second_moments`; 1/d is written to ``divisors``.
    """
    index = tl.program_id(0) + from_row
    param, matrix = _factor(factors, index, matrices)
    group = groups + tl.load(param + tables.MatrixField.GROUP) * _GROUP_FIELDS
    eps = tl.load(group + tables.GroupField.EPS2)
    beta = tl.load(group + tables.GroupField.BETA3)
    beta1 = tl.load(group + tables.GroupField.BETA1)
    batch = tl.load(param + tables.MatrixField.BATCH)
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    inverse = _inverse_divisor(
        tl.load(_doubles(tl.load(param + tables.MatrixField.TOTAL))),
        tl.load(param + tables.MatrixField.FULL_NUMEL),
        tl.load(group + tables.GroupField.CLIP_THRESHOLD),
    )
    delta = inverse - tl.load(divisors + 2 * index).to(tl.float64)
    tl.store(divisors + 2 * index + 1, inverse.to(tl.float32))
    row = _floats(tl.load(param + tables.MatrixField.RESIDUAL_ROW)) + matrix * rows
    column = _floats(tl.load(param + tables.MatrixField.RESIDUAL_COLUMN)) + matrix * columns
    row_total = _update_residual(
        row,
        _doubles(tl.load(param + tables.MatrixField.RESIDUAL_ROWS)) + matrix * rows,
        batch * rows,
        rows,
        delta,
        beta1,
        tl.load(param + tables.MatrixField.FULL_COLUMNS),
        eps,
        beta,
        BLOCK,
    )
    column_total = _update_residual(
        column,
        _doubles(tl.load(param + tables.MatrixField.RESIDUAL_COLUMNS)) + matrix * columns,
        batch * columns,
        columns,
        delta,
        beta1,
        tl.load(param + tables.MatrixField.FULL_ROWS),
        eps,
        beta,
        BLOCK,
    )
    tl.debug_barrier()  # the moments are read again
    mean = _mean(param, row_total, column_total)
    row_confidence = _floats(tl.load(param + tables.MatrixField.ROW_CONFIDENCE)) + matrix * rows
    column_confidence = _floats(tl.load(param + tables.MatrixField.COLUMN_CONFIDENCE))
    _inverse_roots(row, mean, row_confidence, rows, BLOCK)
    _inverse_roots(column, 1.0, column_confidence + matrix * columns, columns, BLOCK)


@triton.jit
def _rates(group):
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


@_kernel
def apply_tiles(
    from_row,
    matrices,
    tiles,
    groups,
    divisors,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Twin of ``passes.apply_update`` for matrices whose momentum is not int8.

    Args as those of :func:`instability_tiles`, with 1/d known.
    """
    param, place, low, high, width, matrix, row, stop_row, column = _tile(
        matrices, tiles, tl.program_id(0) + from_row, ALIGNED
    )
    grads = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    momenta = tl.load(param + tables.MatrixField.EXP_AVG)
    momenta_are_bf16 = tl.load(param + tables.MatrixField.EXP_AVG_IS_BF16)
    key = tl.load(param + tables.MatrixField.KEY)
    full_columns = tl.load(param + tables.MatrixField.FULL_COLUMNS)
    full_row = matrix + tl.load(param + tables.MatrixField.BATCH_OFFSET)
    full_row = full_row * tl.load(param + tables.MatrixField.FULL_ROWS) + row
    full_row += tl.load(param + tables.MatrixField.ROW_OFFSET)
    full_column = column + tl.load(param + tables.MatrixField.COLUMN_OFFSET)
    part_rows = tl.load(param + tables.MatrixField.PART_ROWS)
    part_jump = tl.load(param + tables.MatrixField.PART_JUMP)
    weights = tl.load(param + tables.MatrixField.PARAM)
    remainders = tl.load(param + tables.MatrixField.REMAINDER)
    model = tl.load(param + tables.MatrixField.MODEL_WEIGHT)
    model_is_bf16 = tl.load(param + tables.MatrixField.MODEL_IS_BF16)
    rows = tl.load(param + tables.MatrixField.ROWS)
    row_place = matrix * rows + row
    column_place = matrix * width + column
    row_scales = _floats(tl.load(param + tables.MatrixField.ROW_SCALE)) + row_place
    row_confidences = _floats(tl.load(param + tables.MatrixField.ROW_CONFIDENCE)) + row_place
    column_scales = _floats(tl.load(param + tables.MatrixField.COLUMN_SCALE)) + column_place
    column_confidences = _floats(tl.load(param + tables.MatrixField.COLUMN_CONFIDENCE))
    first_matrix = tl.load(param + tables.MatrixField.FIRST_MATRIX)
    inverse_divisor = tl.load(divisors + 2 * (first_matrix + matrix) + 1)
    beta1, rest, lr, decay = _rates(
        groups + tl.load(param + tables.MatrixField.GROUP) * _GROUP_FIELDS
    )
    steps = tl.arange(0, STEP)
    across = tl.arange(0, COLUMNS)
    inside = across < width - column.to(tl.int32)
    column_scale = tl.load(column_scales + across, mask=inside, other=0.0)
    column_confidence = tl.load(column_confidences + column_place + across, mask=inside, other=0.0)
    for first in range(0, ROWS, STEP):
        down = first + steps
        in_rows = down < (stop_row - row)
        offset = down[:, None] * width + across[None, :]
        mask = in_rows[:, None] & inside[None, :] & (offset >= low) & (offset < high)
        row_scale = tl.load(row_scales + down, mask=in_rows, other=0.0) * inverse_divisor
        row_confidence = tl.load(row_confidences + down, mask=in_rows, other=0.0) * lr
        grad = _elements(grads, is_bf16, place + offset, mask, ALIGNED)
        momentum = _elements(momenta, momenta_are_bf16, place + offset, mask, ALIGNED)
        weight = _weights(weights, remainders, place + offset, mask, ALIGNED)
        momentum = beta1 * momentum + rest * (grad * row_scale[:, None] * column_scale[None, :])
        full_down = full_row + down + (row + down) // part_rows * part_jump
        full_place = full_down[:, None] * full_columns + full_column + across[None, :]
        _store_momentum(
            momenta, momenta_are_bf16, place + offset, momentum, mask, full_place, key, ALIGNED
        )
        weight -= decay * weight
        weight -= row_confidence[:, None] * (momentum * column_confidence[None, :])
        _store_weights(weights, remainders, place + offset, weight, mask, ALIGNED)
        if model != 0:
            _store_short(model, model_is_bf16, place + offset, weight, mask, ALIGNED)


@_kernel
def apply_spans(from_row, matrices, spans, groups, divisors, BLOCKS: tl.constexpr):
    """Twin of ``passes.apply_update`` for matrices whose momentum is int8.

    Args:
        from_row: what the first program takes of the table.
        matrices: table of ``MatrixField``, int64.
        spans: table of ``SpanField``, int64.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        BLOCKS: of a span.
    """
    _note_tables()
    span = spans + (tl.program_id(0) + from_row).to(tl.int64) * _SPAN_FIELDS
    param = matrices + tl.load(span + tables.SpanField.PARAM) * _MATRIX_FIELDS
    first = tl.load(span + tables.SpanField.FIRST)
    stop = tl.load(span + tables.SpanField.STOP)
    rows = tl.load(param + tables.MatrixField.ROWS)
    columns = tl.load(param + tables.MatrixField.COLUMNS)
    # Matrix, row and column of the first element, then those of the others, in 32 bits.
    place = tl.load(param + tables.MatrixField.START) + first
    base = place // columns
    first_matrix = base // rows
    blocks = tl.arange(0, BLOCKS)
    inside = blocks[:, None] * _INT8_BLOCK + tl.arange(0, _INT8_BLOCK)[None, :]
    from_base = (place - base * columns).to(tl.int32) + inside
    below = from_base // columns.to(tl.int32)
    column = from_base - below * columns.to(tl.int32)
    row = (base - first_matrix * rows).to(tl.int32) + below
    matrices_on = row // rows.to(tl.int32)
    row -= matrices_on * rows.to(tl.int32)
    matrix = first_matrix + matrices_on
    index = first + inside
    mask = index < stop

    row_place = base + below
    column_place = matrix * columns + column
    row_scales = _floats(tl.load(param + tables.MatrixField.ROW_SCALE))
    column_scales = _floats(tl.load(param + tables.MatrixField.COLUMN_SCALE))
    row_confidences = _floats(tl.load(param + tables.MatrixField.ROW_CONFIDENCE))
    column_confidences = _floats(tl.load(param + tables.MatrixField.COLUMN_CONFIDENCE))
    row_scale = tl.load(row_scales + row_place, mask=mask, other=0.0)
    column_scale = tl.load(column_scales + column_place, mask=mask, other=0.0)
    row_confidence = tl.load(row_confidences + row_place, mask=mask, other=0.0)
    column_confidence = tl.load(column_confidences + column_place, mask=mask, other=0.0)
    divisor = 2 * (tl.load(param + tables.MatrixField.FIRST_MATRIX) + matrix) + 1
    inverse_divisor = tl.load(divisors + divisor, mask=mask, other=0.0)
    beta1, rest, lr, decay = _rates(
        groups + tl.load(param + tables.MatrixField.GROUP) * _GROUP_FIELDS
    )

    grads = tl.load(param + tables.MatrixField.GRAD)
    is_bf16 = tl.load(param + tables.MatrixField.GRAD_IS_BF16)
    momenta = tl.load(param + tables.MatrixField.EXP_AVG)
    momentum_scales = tl.load(param + tables.MatrixField.EXP_AVG_SCALE)
    weights = tl.load(param + tables.MatrixField.PARAM)
    remainders = tl.load(param + tables.MatrixField.REMAINDER)
    grad = _elements(grads, is_bf16, index, mask, False)
    momentum = _momenta(momenta, 0, momentum_scales, index, mask, False)
    weight = _weights(weights, remainders, index, mask, False)
    momentum = beta1 * momentum + rest * (grad * (row_scale * inverse_divisor) * column_scale)
    weight -= decay * weight
    weight -= (row_confidence * lr) * (momentum * column_confidence)
    _store_weights(weights, remainders, index, weight, mask, False)
    model = tl.load(param + tables.MatrixField.MODEL_WEIGHT)
    if model != 0:
        model_is_bf16 = tl.load(param + tables.MatrixField.MODEL_IS_BF16)
        _store_short(model, model_is_bf16, index, weight, mask, False)

    full_row = matrix + tl.load(param + tables.MatrixField.BATCH_OFFSET)
    full_row = full_row * tl.load(param + tables.MatrixField.FULL_ROWS)
    full_row += row + tl.load(param + tables.MatrixField.ROW_OFFSET)
    parts_on = row // tl.load(param + tables.MatrixField.PART_ROWS).to(tl.int32)
    full_row += parts_on * tl.load(param + tables.MatrixField.PART_JUMP)
    full_column = column + tl.load(param + tables.MatrixField.COLUMN_OFFSET)
    full_place = full_row * tl.load(param + tables.MatrixField.FULL_COLUMNS) + full_column
    key = tl.load(param + tables.MatrixField.KEY)
    block = first // _INT8_BLOCK + blocks
    _store_int8(momenta, momentum_scales, block, index, momentum, mask, full_place, key)


@triton.jit
def _vector(vectors, from_row):
    """A vector's row, its start and its number of elements."""
    vector = vectors + (tl.program_id(0) + from_row).to(tl.int64) * _VECTOR_FIELDS
    start = tl.load(vector + tables.VectorField.START)
    return vector, start, tl.load(vector + tables.VectorField.STOP) - start


@_kernel
def square_vectors(from_row, vectors, BLOCK: tl.constexpr):
    """Twin of ``passes.add_squared_sums`` for a vector.

    Args:
        from_row: what the first program takes of the table.
        vectors: table of ``VectorField``, int64.
        BLOCK: elements that a program reads at once.
    """
    vector, start, size = _vector(vectors, from_row)
    address = tl.load(vector + tables.VectorField.GRAD)
    is_bf16 = tl.load(vector + tables.VectorField.GRAD_IS_BF16)
    out = _doubles(tl.load(vector + tables.VectorField.SQUARES)) + start
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        grad = _elements(address, is_bf16, index, mask, False) * _SQUARE_SCALE
        tl.store(out + index, (grad * grad).to(tl.float64) * _SQUARE_UNSCALE, mask=mask)


@_kernel
def update_vectors(from_row, vectors, groups, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment`` and ``passes.add_squared_update`` for a vector."""
    vector, start, size = _vector(vectors, from_row)
    group = groups + tl.load(vector + tables.VectorField.GROUP) * _GROUP_FIELDS
    moment = _floats(tl.load(vector + tables.VectorField.MOMENT))
    _update_moment(
        moment,
        _doubles(tl.load(vector + tables.VectorField.SQUARES)),
        tl.load(vector + tables.VectorField.SIZE),
        1.0,
        tl.load(group + tables.GroupField.EPS1),
        tl.load(group + tables.GroupField.BETA2),
        BLOCK,
    )
    tl.debug_barrier()  # the moment is read again
    address = tl.load(vector + tables.VectorField.GRAD)
    is_bf16 = tl.load(vector + tables.VectorField.GRAD_IS_BF16)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        grad = _elements(address, is_bf16, index, mask, False)
        root = tl.sqrt_rn(tl.load(moment + start + index, mask=mask, other=1.0))
        update = grad * (1.0 / root)
        total += (update * update).to(tl.float64)
    tl.store(_doubles(tl.load(vector + tables.VectorField.TOTAL)), tl.sum(total, 0))


@_kernel
def apply_vectors(from_row, vectors, groups, BLOCK: tl.constexpr):
    """Twin of ``factors.clip_divisor`` and ``passes.apply_update`` for a vector."""
    vector, start, size = _vector(vectors, from_row)
    group = groups + tl.load(vector + tables.VectorField.GROUP) * _GROUP_FIELDS
    inverse_divisor = _inverse_divisor(
        tl.load(_doubles(tl.load(vector + tables.VectorField.TOTAL))),
        tl.load(vector + tables.VectorField.FULL_NUMEL),
        tl.load(group + tables.GroupField.CLIP_THRESHOLD),
    ).to(tl.float32)
    beta1, rest, lr, decay = _rates(group)
    moment = _floats(tl.load(vector + tables.VectorField.MOMENT)) + start
    momenta = tl.load(vector + tables.VectorField.EXP_AVG)
    momenta_are_bf16 = tl.load(vector + tables.VectorField.EXP_AVG_IS_BF16)
    key = tl.load(vector + tables.VectorField.KEY)
    offset = tl.load(vector + tables.VectorField.OFFSET) + start
    momentum_scales = tl.load(vector + tables.VectorField.EXP_AVG_SCALE)
    part_rows = tl.load(vector + tables.VectorField.PART_ROWS)
    part_jump = tl.load(vector + tables.VectorField.PART_JUMP)
    weights = tl.load(vector + tables.VectorField.PARAM)
    remainders = tl.load(vector + tables.VectorField.REMAINDER)
    blocks = tl.arange(0, BLOCK // _INT8_BLOCK)
    inside = blocks[:, None] * _INT8_BLOCK + tl.arange(0, _INT8_BLOCK)[None, :]
    model = tl.load(vector + tables.VectorField.MODEL_WEIGHT)
    model_is_bf16 = tl.load(vector + tables.VectorField.MODEL_IS_BF16)
    address = tl.load(vector + tables.VectorField.GRAD)
    is_bf16 = tl.load(vector + tables.VectorField.GRAD_IS_BF16)
    for first in range(0, size, BLOCK):
        index = first + inside
        mask = index < size
        grad = _elements(address, is_bf16, index, mask, False)
        root = tl.sqrt_rn(tl.load(moment + index, mask=mask, other=1.0))
        momentum = _momenta(momenta, momenta_are_bf16, momentum_scales, index, mask, False)
        momentum = beta1 * momentum + rest * (grad * (1.0 / root) * inverse_divisor)
        place = offset + index + (start + index) // part_rows * part_jump
        if momentum_scales != 0:
            block = first // _INT8_BLOCK + blocks
            _store_int8(momenta, momentum_scales, block, index, momentum, mask, place, key)
        else:
            _store_momentum(momenta, momenta_are_bf16, index, momentum, mask, place, key, False)
        weight = _weights(weights, remainders, index, mask, False)
        weight -= decay * weight
        weight -= lr * momentum
        _store_weights(weights, remainders, index, weight, mask, False)
        if model != 0:
            _store_short(model, model_is_bf16, index, weight, mask, False)
