"""The passes on the CPU, compiled by Numba: loops over tables, without the GIL.

Every function takes the rows [first, stop) of one table, so that threads can share the work; what
is summed, and in which order, does not depend on their number. The twins of these functions are
those of ``megatron_came.maths``; arithmetic on elements is fp32, on sums float64.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import math
from functools import partial

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.extending import intrinsic

from megatron_came.kernels.tables import FINGERPRINT
from megatron_came.kernels.tables import GroupField as Group
from megatron_came.kernels.tables import MatrixField as Matrix
from megatron_came.kernels.tables import SpanField as Span
from megatron_came.kernels.tables import StripField as Strip
from megatron_came.kernels.tables import TileField as Tile
from megatron_came.kernels.tables import VectorField as Vector
from megatron_came.maths.int8 import BLOCK as INT8_BLOCK

# Sums may be reordered, but NaN and infinity keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}
# As in PyTorch, a division by zero gives infinity or NaN.
_options = {"nogil": True, "error_model": "numpy"}


def _kernel(function):
    """Compile what Python calls, and keep it, under a name that changes with the tables' columns.

    Numba's cache knows a function by its file's date; the columns are in another file.
    """
    function.__qualname__ += f"_{FINGERPRINT}"
    return njit(**_options, cache=True)(function)


# What kernels call becomes part of them. A function of its own would be taken from whichever
# kernel's machine code was loaded first, and in each it is another: a run that compiles the kernels
# would differ in the last bits from one that finds them in the cache.
_inline = partial(njit, **_options, forceinline=True)
_jit = _inline()
_fast = _inline(fastmath=_REORDER)
_elementwise = _inline(fastmath={"contract"})

_ONE = np.float32(1.0)
_SQUARE_SCALE = np.float32(2.0**-10)  # see megatron_came.maths.passes
_SQUARE_UNSCALE = 2.0**20

# In pass 2 the sums of long rows' columns leave the innermost cache, so that rows are taken several
# at a time. Shorter rows share pages of memory, which are read fastest from one end to the other.
_BLOCK = 4
_LONG_ROW = 1024


def _pointer(dtype):
    """Return an intrinsic that turns an address into a pointer."""

    @intrinsic
    def pointer(_context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(address), generate

    return pointer


@intrinsic
def _assume_no_overlap(_context):
    """Promise that none of the function's pointers reach what another one writes."""

    def generate(context, builder, _signature, _args):
        for argument in builder.function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.none(), generate


_to_float32 = _pointer(types.float32)
_to_float64 = _pointer(types.float64)
_to_uint16 = _pointer(types.uint16)
_to_int16 = _pointer(types.int16)
_to_int8 = _pointer(types.int8)


@_jit
def _floats(address, count):
    return carray(_to_float32(address), (count,))


@_jit
def _doubles(address, count):
    return carray(_to_float64(address), (count,))


@_jit
def _at_least(value, low):
    """``torch.clamp(min=low)``: NaN stays NaN."""
    return low if value < low else value


@_elementwise
def _read_bf16(bits, out):
    whole = out.view(np.uint32)
    for i in range(bits.size):
        whole[i] = np.uint32(bits[i]) << np.uint32(16)


@_jit
def _elements(address, is_bf16, offset, stride, rows, count, buffer):
    """Rows of a gradient or momentum in fp32: in their own memory, or in the buffer.

    Returns:
        Address of the first row, elements from there to the next.
    """
    if not is_bf16:
        return address + 4 * offset, stride
    out = np.int64(buffer.ctypes.data)
    for row in range(rows):
        bits = carray(_to_uint16(address + 2 * (offset + row * stride)), (count,))
        _read_bf16(bits, _floats(out + 4 * row * count, count))
    return out, count


@_jit
def _gradients(param, offset, rows, count, buffer):
    address, is_bf16 = param[Matrix.GRAD], param[Matrix.GRAD_IS_BF16]
    return _elements(address, is_bf16, offset, param[Matrix.COLUMNS], rows, count, buffer)


@_elementwise
def _scale_int8(small, scale, out):
    for i in range(small.size):
        out[i] = np.float32(small[i]) * scale


@_jit
def _read_int8(address, scales, offset, count, out):
    """Elements [offset, offset + count) of int8 momentum."""
    done = 0
    while done < count:
        block = (offset + done) // INT8_BLOCK
        size = min((block + 1) * INT8_BLOCK - offset, count) - done
        small = carray(_to_int8(address + offset + done), (size,))
        _scale_int8(small, _floats(scales + 4 * block, 1)[0], out[done : done + size])
        done += size


@_jit
def _momenta(param, offset, rows, count, buffer):
    address, scales = param[Matrix.EXP_AVG], param[Matrix.EXP_AVG_SCALE]
    is_bf16, columns = param[Matrix.EXP_AVG_IS_BF16], param[Matrix.COLUMNS]
    if not scales:
        return _elements(address, is_bf16, offset, columns, rows, count, buffer)
    out = np.int64(buffer.ctypes.data)
    for row in range(rows):
        into = _floats(out + 4 * row * count, count)
        _read_int8(address, scales, offset + row * columns, count, into)
    return out, count


@_jit
def _gradient(param, offset, count, buffer):
    return _floats(_gradients(param, offset, 1, count, buffer)[0], count)


@_jit
def _momentum(param, offset, count, buffer):
    return _floats(_momenta(param, offset, 1, count, buffer)[0], count)


@_elementwise
def _draw_some(first_place, offset, bits):
    for i in range(bits.size):
        mixed = np.uint32(np.uint32(first_place + i) * np.uint32(0x9E3779B1) + offset)
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        bits[i] = np.uint16(mixed ^ (mixed >> np.uint32(16)))


@_jit
def _draw(first_place, key, bits):
    """Twin of ``rounding.random_bits`` for consecutive places."""
    done = 0
    while done < bits.size:  # once, but where the upper half of the place changes
        high = (first_place + done) >> 32
        stop = min(((high + 1) << 32) - first_place, bits.size)
        offset = np.uint32(high * 0x27D4EB2F + key)
        _draw_some(first_place + done, offset, bits[done:stop])
        done = stop


@_elementwise
def _round_to_bf16(values, bits, kept):
    """Twin of ``rounding.to_bf16``."""
    whole = values.view(np.uint32)
    for i in range(values.size):
        word = whole[i]
        quiet = np.uint32(0x10000) if values[i] != values[i] else np.uint32(0)
        finite = (word & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        rounded = np.uint32(word + np.uint32(bits[i])) if finite else np.uint32(word | quiet)
        kept[i] = np.uint16(rounded >> np.uint32(16))


@_elementwise
def _round_block_to_int8(values, bits, kept):
    """Twin of ``int8.quantize`` for a block; returns its scale."""
    whole = values.view(np.int32)
    largest = np.int32(0)
    for i in range(values.size):
        largest = max(largest, whole[i] & np.int32(0x7FFFFFFF))
    if largest >= 0x7F800000:
        kept[:] = 0
        return np.float32(np.nan)
    exponent = ((int(largest) + 0x1FFFF) >> 23) - 6
    exponent = max(exponent, 1) - 127
    inverse = np.float32(math.ldexp(1.0, -exponent))
    for i in range(values.size):
        dither = (np.float32(bits[i]) + np.float32(0.5)) * np.float32(2.0**-16)
        exact = values[i] * inverse + dither
        cut = np.int32(exact)  # towards zero
        kept[i] = np.int8(cut - np.int32(np.float32(cut) > exact))
    return np.float32(math.ldexp(1.0, exponent))


@_jit
def _keep_momentum(address, is_bf16, scales, offset, values, bits):
    """Round momentum to where it is kept, if that is not its own memory; int8 by whole blocks."""
    count = values.size
    if is_bf16:
        _round_to_bf16(values, bits, carray(_to_uint16(address + 2 * offset), (count,)))
    if scales:
        for first in range(0, count, INT8_BLOCK):
            stop = min(first + INT8_BLOCK, count)
            kept = carray(_to_int8(address + offset + first), (stop - first,))
            scale = _round_block_to_int8(values[first:stop], bits[first:stop], kept)
            _floats(scales + 4 * ((offset + first) // INT8_BLOCK), 1)[0] = scale


@_elementwise
def _join(high, low, out):
    """Twin of ``remainders.join``."""
    whole = out.view(np.int32)
    for i in range(out.size):
        whole[i] = (np.int32(high[i]) << np.int32(16)) + np.int32(low[i])


@_elementwise
def _split(values, high, low):
    """Twin of ``remainders.split``."""
    bits = values.view(np.int32)
    for i in range(values.size):
        whole = bits[i] if values[i] == values[i] else np.int32(0x7FC00000)
        rest = np.int16(whole)
        low[i] = rest
        high[i] = (whole - np.int32(rest)) >> np.int32(16)


@_jit
def _weights(address, remainders, offset, count, buffer):
    """Fp32 weights: their own memory, or the buffer."""
    if not remainders:
        return _floats(address + 4 * offset, count)
    out = buffer[:count]
    high = carray(_to_int16(address + 2 * offset), (count,))
    _join(high, carray(_to_int16(remainders + 2 * offset), (count,)), out)
    return out


@_jit
def _keep_weights(address, remainders, offset, values):
    """Split weights to where they are kept, if that is not their own memory."""
    if remainders:
        high = carray(_to_int16(address + 2 * offset), (values.size,))
        _split(values, high, carray(_to_int16(remainders + 2 * offset), (values.size,)))


@_elementwise
def _write_bf16(values, bits):
    """Round to nearest even; NaN stays NaN."""
    whole = values.view(np.uint32)
    for i in range(values.size):
        odd = (whole[i] >> np.uint32(16)) & np.uint32(1)
        rounded = (whole[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        bits[i] = np.uint32(0x7FC0) if values[i] != values[i] else rounded


@_jit
def _copy_to_model(address, offset, values):
    """Write the 16-bit model weights, if there are any."""
    if address:
        _write_bf16(values, carray(_to_uint16(address + 2 * offset), (values.size,)))


@_jit
def _slot(scratch, index):
    """Address of a slot. Not a view of the array, whose count of references threads would share."""
    return scratch.ctypes.data + 4 * index * scratch.shape[1] * scratch.shape[2]


@_jit
def _span(param, tile, row, tile_columns):
    """What of a tile's row lies in the slice.

    Returns:
        [low, high) of the flattened local tensor; the place there of the tile's first column.
    """
    first = (tile[Tile.MATRIX] * param[Matrix.ROWS] + row) * param[Matrix.COLUMNS]
    end = first + min(tile[Tile.COLUMN] + tile_columns, param[Matrix.COLUMNS])
    first += tile[Tile.COLUMN]
    return max(first, param[Matrix.START]), min(end, param[Matrix.STOP]), first


@_jit
def _clear(slot, kinds, width, used):
    for kind in range(kinds):
        _floats(slot + 4 * kind * width, used)[:] = 0.0


@_fast
def _square_row(grad, column_sums):
    total = np.float32(0.0)
    for i in range(grad.size):
        scaled = grad[i] * _SQUARE_SCALE
        square = scaled * scaled
        total += square
        column_sums[i] += square
    return total


@_kernel
def square_tiles(first, stop, origin, matrices, tiles, scratch, tile_rows, tile_columns):
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
    """
    width = tile_rows + tile_columns
    buffer = np.empty(tile_columns, np.float32)
    for index in range(first, stop):
        tile = tiles[index]
        param = matrices[tile[Tile.PARAM]]
        slot = _slot(scratch, index - origin)
        _clear(slot, 1, width, tile_rows + min(tile_columns, param[Matrix.COLUMNS]))
        row_sums = _floats(slot, tile_rows)
        for row in range(tile[Tile.ROW], tile[Tile.STOP_ROW]):
            low, high, start = _span(param, tile, row, tile_columns)
            if low < high:
                count = high - low
                row_sums[row - tile[Tile.ROW]] = _square_row(
                    _gradient(param, low - param[Matrix.START], count, buffer),
                    _floats(slot + 4 * (tile_rows + low - start), count),
                )


def _instability_rows(rows):
    @_fast
    def instability_rows(
        grad,
        grad_stride,
        exp_avg,
        exp_avg_stride,
        count,
        row_scale,
        column_scale,
        inverse_guess,
        row_errors,
        row_crosses,
        row_updates,
        column_errors,
        column_crosses,
        column_updates,
    ):
        _assume_no_overlap()
        for i in range(count):
            errors, crosses, updates = column_errors[i], column_crosses[i], column_updates[i]
            for row in range(rows):
                update = grad[row * grad_stride + i] * row_scale[row] * column_scale[i]
                error = update * inverse_guess - exp_avg[row * exp_avg_stride + i]
                square, cross, update_square = error * error, update * error, update * update
                row_errors[row] += square
                row_crosses[row] += cross
                row_updates[row] += update_square
                errors += square
                crosses += cross
                updates += update_square
            column_errors[i], column_crosses[i], column_updates[i] = errors, crosses, updates

    return instability_rows


_instability_row, _instability_block = _instability_rows(1), _instability_rows(_BLOCK)


@_kernel
def instability_tiles(
    first, stop, origin, matrices, tiles, divisors, scratch, tile_rows, tile_columns
):
    """Twin of ``passes.add_instability_sums``: the sums of e^2, u e and u^2 of each tile.

    Args as those of :func:`square_tiles`, and
        divisors: (matrices, 2), fp32: 1/d0, and 1/d which is not known yet.
    """
    width = tile_rows + tile_columns
    buffer = np.empty(_BLOCK * tile_columns, np.float32)
    momenta = np.empty(_BLOCK * tile_columns, np.float32)
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
        while row < stop_row:
            low, high, start = _span(param, tile, row, tile_columns)
            block = columns > _LONG_ROW and row + _BLOCK <= stop_row
            # All of the block's rows must lie in the slice, from one end of the tile to the other.
            block &= low == start and high + (_BLOCK - 1) * columns <= param[Matrix.STOP]
            together = _BLOCK if block else 1
            if low < high:
                offset, count, column = low - param[Matrix.START], high - low, low - start
                grad, grad_stride = _gradients(param, offset, together, count, buffer)
                exp_avg, exp_avg_stride = _momenta(param, offset, together, count, momenta)
                row_sums = slot + 4 * (row - tile[Tile.ROW])
                column_sums = slot + 4 * (tile_rows + column)
                args = (
                    _to_float32(grad),
                    grad_stride,
                    _to_float32(exp_avg),
                    exp_avg_stride,
                    count,
                    _to_float32(row_scale + 4 * row),
                    _to_float32(column_scale + 4 * (tile[Tile.COLUMN] + column)),
                    inverse_guess,
                    _to_float32(row_sums),
                    _to_float32(row_sums + 4 * width),
                    _to_float32(row_sums + 8 * width),
                    _to_float32(column_sums),
                    _to_float32(column_sums + 4 * width),
                    _to_float32(column_sums + 8 * width),
                )
                if block:
                    _instability_block(*args)
                else:
                    _instability_row(*args)
            row += together


@_kernel
def add_square_strips(first, stop, strips, scratch):
    """Add the tiles' sums of g^2 to the buffer of sums."""
    for index in range(first, stop):
        strip = strips[index]
        out = _doubles(strip[Strip.SQUARES], strip[Strip.COUNT])
        _add_strip(strip, scratch[:, 0], _SQUARE_UNSCALE, out)


@_kernel
def add_instability_strips(first, stop, strips, scratch):
    """Add the tiles' sums of e^2, u e and u^2 to the buffer of sums."""
    for index in range(first, stop):
        strip = strips[index]
        for kind in range(3):
            address = strip[Strip.RESIDUALS] + 8 * kind * strip[Strip.RESIDUALS_STRIDE]
            _add_strip(strip, scratch[:, kind], 1.0, _doubles(address, strip[Strip.COUNT]))


@_jit
def _add_strip(strip, scratch, factor, out):
    within, count = strip[Strip.WITHIN], strip[Strip.COUNT]
    for tile in range(strip[Strip.TILES]):
        sums = scratch[strip[Strip.SLOT] + tile * strip[Strip.STRIDE], within : within + count]
        for i in range(count):
            out[i] += factor * np.float64(sums[i])


@_fast
def _update_moment(moment, sums, count, eps, beta):
    """Twin of ``factors.update_moment``; returns the sum of the moment, and of the mean over it."""
    total, ratio = 0.0, 0.0
    keep, add = np.float32(beta), np.float32(1.0 - beta)
    for i in range(moment.size):
        mean = sums[i] / count + eps
        moment[i] = keep * moment[i] + add * np.float32(mean)
        total += moment[i]
        ratio += mean / np.float64(moment[i])
    return total, ratio


@_elementwise
def _inverse_roots(moment, mean, out):
    for i in range(moment.size):
        out[i] = _ONE / math.sqrt(moment[i] / mean)


@_jit
def _mean(param, row_total, column_total):
    """mean(r) = mean(c) of the full matrix, from the factor that this rank holds whole."""
    if param[Matrix.ROWS_ARE_WHOLE]:
        return np.float32(row_total / param[Matrix.ROWS])
    return np.float32(column_total / param[Matrix.COLUMNS])


@_jit
def _matrix(address, index, size, width):
    return address + width * index * size


@_kernel
def update_second_moments(first, stop, matrices, factors, groups, divisors):
    """Twin of ``factors.update_moment``, ``scales`` and ``guessed_divisor`` (of each matrix).

    Args:
        first: row of ``factors``.
        stop: one past the last row.
        matrices: table of ``MatrixField``.
        factors: (matrices, 2): matrix parameter, place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32, out: 1/d0.
    """
    for index in range(first, stop):
        param, matrix = matrices[factors[index, 0]], factors[index, 1]
        group = groups[param[Matrix.GROUP]]
        rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
        row = _floats(param[Matrix.ROW] + 4 * matrix * rows, rows)
        column = _floats(param[Matrix.COLUMN] + 4 * matrix * columns, columns)
        eps, beta = group[Group.EPS1], group[Group.BETA2]
        row_total, row_ratio = _update_moment(
            row,
            _doubles(param[Matrix.SQUARE_ROWS] + 8 * matrix * rows, rows),
            param[Matrix.FULL_COLUMNS],
            eps,
            beta,
        )
        column_total, column_ratio = _update_moment(
            column,
            _doubles(param[Matrix.SQUARE_COLUMNS] + 8 * matrix * columns, columns),
            param[Matrix.FULL_ROWS],
            eps,
            beta,
        )
        mean = _mean(param, row_total, column_total)
        _inverse_roots(row, mean, _floats(param[Matrix.ROW_SCALE] + 4 * matrix * rows, rows))
        _inverse_roots(
            column, _ONE, _floats(param[Matrix.COLUMN_SCALE] + 4 * matrix * columns, columns)
        )
        squared = 0.0
        if param[Matrix.ROWS_ARE_WHOLE]:
            squared = _at_least(row_ratio / rows, squared)
        if param[Matrix.COLUMNS_ARE_WHOLE]:
            squared = _at_least(column_ratio / columns, squared)
        guess = _at_least(math.sqrt(squared) / group[Group.CLIP_THRESHOLD], 1.0)
        divisors[index, 0] = np.float32(1.0 / guess)


@_fast
def _sum(values):
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@_kernel
def total_updates(first, stop, matrices):
    """Sum u^2 over this rank's part of each matrix parameter, from its row sums."""
    for index in range(first, stop):
        param = matrices[index]
        count = param[Matrix.BATCH] * param[Matrix.ROWS]
        sums = _doubles(param[Matrix.RESIDUAL_ROWS] + 16 * count, count)
        _doubles(param[Matrix.TOTAL], 1)[0] = _sum(sums)


@_jit
def _inverse_divisor(total, numel, clip_threshold):
    """Twin of ``factors.clip_divisor``, of which it returns the inverse."""
    return 1.0 / _at_least(math.sqrt(total / numel) / clip_threshold, 1.0)


@_fast
def _update_residual(moment, sums, stride, delta, beta1, count, eps, beta):
    """Twin of ``factors.true_residuals`` and ``update_moment``; returns the moment's sum."""
    total = 0.0
    keep, add = np.float32(beta), np.float32(1.0 - beta)
    for i in range(moment.size):
        error, cross, square = sums[i], sums[i + stride], sums[i + 2 * stride]
        residual = error + delta * (2.0 * cross + delta * square)
        residual = _at_least(residual, 0.0) * beta1 * beta1
        moment[i] = keep * moment[i] + add * np.float32(residual / count + eps)
        total += moment[i]
    return total


@_kernel
def update_instabilities(first, stop, matrices, factors, groups, divisors):
    """Twin of ``factors.clip_divisor``, ``true_residuals``, ``update_moment`` and ``scales``.

    Args as those of :func:`update_second_moments`; 1/d is written to ``divisors``.
    """
    for index in range(first, stop):
        param, matrix = matrices[factors[index, 0]], factors[index, 1]
        group = groups[param[Matrix.GROUP]]
        batch, rows, columns = param[Matrix.BATCH], param[Matrix.ROWS], param[Matrix.COLUMNS]
        row = _floats(param[Matrix.RESIDUAL_ROW] + 4 * matrix * rows, rows)
        column = _floats(param[Matrix.RESIDUAL_COLUMN] + 4 * matrix * columns, columns)
        inverse = _inverse_divisor(
            _doubles(param[Matrix.TOTAL], 1)[0],
            param[Matrix.FULL_NUMEL],
            group[Group.CLIP_THRESHOLD],
        )
        delta = inverse - np.float64(divisors[index, 0])
        divisors[index, 1] = np.float32(inverse)
        eps, beta, beta1 = group[Group.EPS2], group[Group.BETA3], group[Group.BETA1]
        row_sums = _doubles(param[Matrix.RESIDUAL_ROWS], 3 * batch * rows)[matrix * rows :]
        column_sums = _doubles(param[Matrix.RESIDUAL_COLUMNS], 3 * batch * columns)
        row_total = _update_residual(
            row, row_sums, batch * rows, delta, beta1, param[Matrix.FULL_COLUMNS], eps, beta
        )
        column_total = _update_residual(
            column,
            column_sums[matrix * columns :],
            batch * columns,
            delta,
            beta1,
            param[Matrix.FULL_ROWS],
            eps,
            beta,
        )
        mean = _mean(param, row_total, column_total)
        _inverse_roots(row, mean, _floats(param[Matrix.ROW_CONFIDENCE] + 4 * matrix * rows, rows))
        _inverse_roots(
            column, _ONE, _floats(param[Matrix.COLUMN_CONFIDENCE] + 4 * matrix * columns, columns)
        )


@_elementwise
def _apply_row(
    param, grad, exp_avg, column_scale, column_confidence, row_scale, step, beta1, rest, decay
):
    for i in range(param.size):
        momentum = beta1 * exp_avg[i] + rest * (grad[i] * row_scale * column_scale[i])
        exp_avg[i] = momentum
        weight = param[i]
        weight -= decay * weight
        param[i] = weight - step * (momentum * column_confidence[i])


@_jit
def _update(
    param, groups, divisors, matrix, row, column, offset, momentum, bits, grad_buffer, buffer
):
    """Update part of a row: the momentum in fp32, the weights where they are kept.

    Args:
        param: row of the table of matrix parameters.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        matrix: place in the batch.
        row: of the matrix.
        column: first one.
        offset: first element, in the slice.
        momentum: fp32.
        bits: like momentum, uint16, out: what the momentum is to be rounded with.
        grad_buffer: for the gradient in fp32.
        buffer: for the weights in fp32.
    """
    count, group = momentum.size, groups[param[Matrix.GROUP]]
    rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
    row_scale = _floats(param[Matrix.ROW_SCALE] + 4 * (matrix * rows + row), 1)[0]
    row_confidence = _floats(param[Matrix.ROW_CONFIDENCE] + 4 * (matrix * rows + row), 1)[0]
    place = 4 * (matrix * columns + column)
    weights = _weights(param[Matrix.PARAM], param[Matrix.REMAINDER], offset, count, buffer)
    _apply_row(
        weights,
        _gradient(param, offset, count, grad_buffer),
        momentum,
        _floats(param[Matrix.COLUMN_SCALE] + place, count),
        _floats(param[Matrix.COLUMN_CONFIDENCE] + place, count),
        row_scale * divisors[param[Matrix.FIRST_MATRIX] + matrix, 1],
        np.float32(group[Group.LR]) * row_confidence,
        np.float32(group[Group.BETA1]),
        np.float32(1.0 - group[Group.BETA1]),
        np.float32(group[Group.LR] * group[Group.WEIGHT_DECAY]),
    )
    _keep_weights(param[Matrix.PARAM], param[Matrix.REMAINDER], offset, weights)
    _copy_to_model(param[Matrix.MODEL_WEIGHT], offset, weights)
    if param[Matrix.EXP_AVG_IS_BF16] or param[Matrix.EXP_AVG_SCALE]:
        full_row = (matrix + param[Matrix.BATCH_OFFSET]) * param[Matrix.FULL_ROWS]
        full_row += row + param[Matrix.ROW_OFFSET]
        full_row += row // param[Matrix.PART_ROWS] * param[Matrix.PART_JUMP]
        full_place = full_row * param[Matrix.FULL_COLUMNS] + param[Matrix.COLUMN_OFFSET] + column
        _draw(full_place, param[Matrix.KEY], bits)


@_kernel
def apply_tiles(first, stop, matrices, tiles, groups, divisors, tile_columns):
    """Twin of ``passes.apply_update`` for matrices whose momentum is not int8.

    Args as those of :func:`instability_tiles`, with 1/d known.
    """
    grads, weights = np.empty(tile_columns, np.float32), np.empty(tile_columns, np.float32)
    momenta, bits = np.empty(tile_columns, np.float32), np.empty(tile_columns, np.uint16)
    for index in range(first, stop):
        tile = tiles[index]
        param, matrix = matrices[tile[Tile.PARAM]], tile[Tile.MATRIX]
        for row in range(tile[Tile.ROW], tile[Tile.STOP_ROW]):
            low, high, start = _span(param, tile, row, tile_columns)
            if low < high:
                offset, count = low - param[Matrix.START], high - low
                momentum = _momentum(param, offset, count, momenta)
                column, drawn = tile[Tile.COLUMN] + low - start, bits[:count]
                _update(
                    param, groups, divisors, matrix, row, column, offset, momentum, drawn, grads,
                    weights,
                )  # fmt: skip
                _keep_momentum(
                    param[Matrix.EXP_AVG], param[Matrix.EXP_AVG_IS_BF16], 0, offset, momentum, drawn
                )


@_kernel
def apply_spans(first, stop, matrices, spans, groups, divisors, span_elements):
    """Twin of ``passes.apply_update`` for matrices whose momentum is int8.

    Args:
        first: row of the table of spans.
        stop: one past the last row.
        matrices: table of ``MatrixField``.
        spans: table of ``SpanField``.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        span_elements: of a span, at most.
    """
    grads, weights = np.empty(span_elements, np.float32), np.empty(span_elements, np.float32)
    momenta, bits = np.empty(span_elements, np.float32), np.empty(span_elements, np.uint16)
    for index in range(first, stop):
        param = matrices[spans[index, Span.PARAM]]
        rows, columns = param[Matrix.ROWS], param[Matrix.COLUMNS]
        low, high = spans[index, Span.FIRST], spans[index, Span.STOP]
        momentum, drawn = momenta[: high - low], bits[: high - low]
        address, scales = param[Matrix.EXP_AVG], param[Matrix.EXP_AVG_SCALE]
        _read_int8(address, scales, low, high - low, momentum)
        offset = low
        while offset < high:
            all_rows = (param[Matrix.START] + offset) // columns
            column = param[Matrix.START] + offset - all_rows * columns
            matrix = all_rows // rows
            end = min(offset + columns - column, high)
            part, some = momentum[offset - low : end - low], drawn[offset - low : end - low]
            row = all_rows - matrix * rows
            _update(
                param, groups, divisors, matrix, row, column, offset, part, some, grads, weights
            )
            offset = end
        _keep_momentum(address, 0, scales, low, momentum, drawn)


@_jit
def _whole(vector, address, is_bf16):
    """All elements of a slice of a vector in fp32."""
    count = vector[Vector.STOP] - vector[Vector.START]
    if not is_bf16:
        return _floats(address, count)
    out = np.empty(count, np.float32)
    _read_bf16(carray(_to_uint16(address), (count,)), out)
    return out


@_jit
def _vector_gradient(vector):
    return _whole(vector, vector[Vector.GRAD], vector[Vector.GRAD_IS_BF16])


@_kernel
def square_vectors(first, stop, vectors):
    """Twin of ``passes.add_squared_sums`` for vectors."""
    for index in range(first, stop):
        vector = vectors[index]
        grad = _vector_gradient(vector)
        out = _doubles(vector[Vector.SQUARES] + 8 * vector[Vector.START], grad.size)
        for i in range(grad.size):
            scaled = grad[i] * _SQUARE_SCALE
            out[i] = np.float64(scaled * scaled) * _SQUARE_UNSCALE


@_kernel
def update_vectors(first, stop, vectors, groups):
    """Twin of ``factors.update_moment`` and ``passes.add_squared_update`` for vectors."""
    for index in range(first, stop):
        vector = vectors[index]
        group = groups[vector[Vector.GROUP]]
        size, start = vector[Vector.SIZE], vector[Vector.START]
        moment = _floats(vector[Vector.MOMENT], size)
        _update_moment(
            moment, _doubles(vector[Vector.SQUARES], size), 1, group[Group.EPS1], group[Group.BETA2]
        )
        grad = _vector_gradient(vector)
        total = 0.0
        for i in range(grad.size):
            update = grad[i] * (_ONE / math.sqrt(moment[start + i]))
            total += np.float64(update * update)
        _doubles(vector[Vector.TOTAL], 1)[0] = total


@_jit
def _vector_bits(vector):
    """Random bits of a slice of a vector, part by part."""
    start, stop = vector[Vector.START], vector[Vector.STOP]
    bits = np.empty(stop - start, np.uint16)
    place = start
    while place < stop:
        part = place // vector[Vector.PART_ROWS]
        end = min((part + 1) * vector[Vector.PART_ROWS], stop)
        full_place = vector[Vector.OFFSET] + place + part * vector[Vector.PART_JUMP]
        _draw(full_place, vector[Vector.KEY], bits[place - start : end - start])
        place = end
    return bits


@_kernel
def apply_vectors(first, stop, vectors, groups):
    """Twin of ``factors.clip_divisor`` and ``passes.apply_update`` for vectors."""
    for index in range(first, stop):
        vector = vectors[index]
        group = groups[vector[Vector.GROUP]]
        moment = _floats(vector[Vector.MOMENT], vector[Vector.SIZE])[vector[Vector.START] :]
        grad = _vector_gradient(vector)
        remainders, scales = vector[Vector.REMAINDER], vector[Vector.EXP_AVG_SCALE]
        buffer = np.empty(grad.size, np.float32)
        param = _weights(vector[Vector.PARAM], remainders, 0, grad.size, buffer)
        if scales:
            exp_avg = np.empty(grad.size, np.float32)
            _read_int8(vector[Vector.EXP_AVG], scales, 0, grad.size, exp_avg)
        else:
            exp_avg = _whole(vector, vector[Vector.EXP_AVG], vector[Vector.EXP_AVG_IS_BF16])
        inverse_divisor = np.float32(
            _inverse_divisor(
                _doubles(vector[Vector.TOTAL], 1)[0],
                vector[Vector.FULL_NUMEL],
                group[Group.CLIP_THRESHOLD],
            )
        )
        beta1, rest = np.float32(group[Group.BETA1]), np.float32(1.0 - group[Group.BETA1])
        lr = np.float32(group[Group.LR])
        decay = np.float32(group[Group.LR] * group[Group.WEIGHT_DECAY])
        for i in range(grad.size):
            update = grad[i] * (_ONE / math.sqrt(moment[i])) * inverse_divisor
            momentum = beta1 * exp_avg[i] + rest * update
            exp_avg[i] = momentum
            weight = param[i]
            weight -= decay * weight
            param[i] = weight - lr * momentum
        if vector[Vector.EXP_AVG_IS_BF16] or scales:
            bits = _vector_bits(vector)
            address, is_bf16 = vector[Vector.EXP_AVG], vector[Vector.EXP_AVG_IS_BF16]
            _keep_momentum(address, is_bf16, scales, 0, exp_avg, bits)
        _keep_weights(vector[Vector.PARAM], remainders, 0, param)
        _copy_to_model(vector[Vector.MODEL_WEIGHT], 0, param)
