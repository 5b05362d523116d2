"""Passes 1 and 2: sums over rows and columns.

Columns are summed in fp32 by tiles of rows, in ``partial``, and these in float64; so the number of
threads changes no bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import numpy as np
from numba import prange

from megatron_came.kernels.cpu.compiling import (
    ONE,
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    UPDATE_SCALE,
    UPDATE_UNSCALE,
    Kernel,
    fast,
    inline,
)
from megatron_came.kernels.cpu.precision import read, widen
from megatron_came.kernels.cpu.shapes import AT_ONCE

# Elements of a row that are added up in fp32; their sums are added in float64.
_WIDTH = 4096


@inline
def _quarter(geometry, row, stop):
    """Return a quarter of a tile's rows, if all of them lie in the slice from end to end."""
    low, high = row * geometry.columns, stop * geometry.columns
    is_whole = low >= geometry.start and high <= geometry.start + geometry.size
    return (stop - row) // AT_ONCE if is_whole else 0


@inline
def _in_slice(geometry, row):
    """Return what of a row lies in the slice: first element, last + 1, and the first's column."""
    offset = row * geometry.columns - geometry.start
    low, high = max(offset, 0), min(offset + geometry.columns, geometry.size)
    return low, high, low - offset


@inline
def _add_tiles(tiles, partial, kind, factor, sums):
    """Add the tiles to the sums of their matrices, (batch, columns)."""
    for number in range(len(tiles)):
        some, out = partial[number, kind], sums[tiles[number, 0]]
        for i in range(out.size):
            out[i] += factor * np.float64(some[i])


@fast
def _square_row(grad, sums):
    total = np.float32(0)
    for i in range(grad.size):
        g = widen(grad[i], ONE) * SQUARE_SCALE
        total += g * g
        sums[i] += g * g
    return total


@fast
def _square_rows(g0, g1, g2, g3, sums):
    a = b = c = d = np.float32(0)
    for i in range(sums.size):
        p, q = widen(g0[i], ONE) * SQUARE_SCALE, widen(g1[i], ONE) * SQUARE_SCALE
        r, s = widen(g2[i], ONE) * SQUARE_SCALE, widen(g3[i], ONE) * SQUARE_SCALE
        a, b, c, d = a + p * p, b + q * q, c + r * r, d + s * s
        sums[i] += p * p + q * q + r * r + s * s
    return a, b, c, d


@inline
def _square_tile(grad, geometry, row, stop, row_sums, sums):
    sums[:] = 0
    row_sums[row:stop] = 0
    n, apart = geometry.columns, _quarter(geometry, row, stop)
    for r0 in range(row, row + apart):
        r1, r2, r3 = r0 + apart, r0 + 2 * apart, r0 + 3 * apart
        for left in range(0, n, _WIDTH):
            right = min(left + _WIDTH, n)
            a, b = r0 * n - geometry.start + left, r1 * n - geometry.start + left
            c, d = r2 * n - geometry.start + left, r3 * n - geometry.start + left
            w = right - left
            totals = _square_rows(
                grad[a : a + w], grad[b : b + w], grad[c : c + w], grad[d : d + w],
                sums[left:right],
            )  # fmt: skip
            row_sums[r0] += totals[0]
            row_sums[r1] += totals[1]
            row_sums[r2] += totals[2]
            row_sums[r3] += totals[3]
    for alone in range(row + AT_ONCE * apart, stop):
        low, high, column = _in_slice(geometry, alone)
        for left in range(low, high, _WIDTH):
            right = min(left + _WIDTH, high)
            row_sums[alone] += _square_row(grad[left:right], sums[column + left - low :])
    for i in range(row, stop):
        row_sums[i] *= SQUARE_UNSCALE


@Kernel
def add_square_sums(grad, geometry, tiles, row_sums, column_sums, partial, threads):
    """Pass 1: sums of g^2 of a slice, fp32 or bf16, with its tiles of rows.

    ``row_sums`` (batch rows,) and ``column_sums`` (batch, columns), zeros before, are float64;
    ``partial``, scratch for sums of columns, is fp32: (tiles, 3, columns).
    """
    count = len(tiles)
    for thread in prange(threads):
        for number in range(count * thread // threads, count * (thread + 1) // threads):
            _, row, stop = tiles[number]
            _square_tile(grad, geometry, row, stop, row_sums, partial[number, 0])
    _add_tiles(tiles, partial, 0, SQUARE_UNSCALE, column_sums)


@fast
def _instability_row(g, m, row_scale, column_scale, guess, errors, crosses, squares):
    a = b = c = np.float32(0)
    for i in range(g.size):
        u = widen(g[i], ONE) * row_scale * column_scale[i]
        e = u * guess - widen(m[i], ONE) * UPDATE_SCALE
        a, b, c = a + e * e, b + u * e, c + u * u
        errors[i] += e * e
        crosses[i] += u * e
        squares[i] += u * u
    return a, b, c


@fast
def _instability_rows(g, m, row_scales, column_scale, guess, errors, crosses, squares):
    """Four rows at once."""
    g0, g1, g2, g3 = g
    m0, m1, m2, m3 = m
    r0, r1, r2, r3 = row_scales
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = np.float32(0)
    for i in range(column_scale.size):
        s = column_scale[i]
        u0, u1 = widen(g0[i], ONE) * r0 * s, widen(g1[i], ONE) * r1 * s
        u2, u3 = widen(g2[i], ONE) * r2 * s, widen(g3[i], ONE) * r3 * s
        e0 = u0 * guess - widen(m0[i], ONE) * UPDATE_SCALE
        e1 = u1 * guess - widen(m1[i], ONE) * UPDATE_SCALE
        e2 = u2 * guess - widen(m2[i], ONE) * UPDATE_SCALE
        e3 = u3 * guess - widen(m3[i], ONE) * UPDATE_SCALE
        a0, a1, a2, a3 = a0 + e0 * e0, a1 + e1 * e1, a2 + e2 * e2, a3 + e3 * e3
        b0, b1, b2, b3 = b0 + u0 * e0, b1 + u1 * e1, b2 + u2 * e2, b3 + u3 * e3
        c0, c1, c2, c3 = c0 + u0 * u0, c1 + u1 * u1, c2 + u2 * u2, c3 + u3 * u3
        errors[i] += e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3
        crosses[i] += u0 * e0 + u1 * e1 + u2 * e2 + u3 * e3
        squares[i] += u0 * u0 + u1 * u1 + u2 * u2 + u3 * u3
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3)


@inline
def _instability_tile(
    grad, momentum, block_scales, geometry, row, stop, row_scale, column_scale, guess, row_sums,
    sums, scratch,
):  # fmt: skip
    sums[:] = 0
    row_sums[:, row:stop] = 0
    n, apart = geometry.columns, _quarter(geometry, row, stop)
    for r0 in range(row, row + apart):
        r1, r2, r3 = r0 + apart, r0 + 2 * apart, r0 + 3 * apart
        for left in range(0, n, _WIDTH):
            w = min(_WIDTH, n - left)
            a, b = r0 * n - geometry.start + left, r1 * n - geometry.start + left
            c, d = r2 * n - geometry.start + left, r3 * n - geometry.start + left
            totals = _instability_rows(
                (grad[a : a + w], grad[b : b + w], grad[c : c + w], grad[d : d + w]),
                (
                    read(momentum, block_scales, a, a + w, scratch[0]),
                    read(momentum, block_scales, b, b + w, scratch[1]),
                    read(momentum, block_scales, c, c + w, scratch[2]),
                    read(momentum, block_scales, d, d + w, scratch[3]),
                ),
                (
                    row_scale[r0] * UPDATE_SCALE, row_scale[r1] * UPDATE_SCALE,
                    row_scale[r2] * UPDATE_SCALE, row_scale[r3] * UPDATE_SCALE,
                ),
                column_scale[left : left + w], guess, sums[0, left:], sums[1, left:],
                sums[2, left:],
            )  # fmt: skip
            for kind in range(3):
                row_sums[kind, r0] += totals[kind][0]
                row_sums[kind, r1] += totals[kind][1]
                row_sums[kind, r2] += totals[kind][2]
                row_sums[kind, r3] += totals[kind][3]
    for alone in range(row + AT_ONCE * apart, stop):
        low, high, column = _in_slice(geometry, alone)
        for left in range(low, high, _WIDTH):
            right, at = min(left + _WIDTH, high), column + left - low
            alone_totals = _instability_row(
                grad[left:right], read(momentum, block_scales, left, right, scratch[0]),
                row_scale[alone] * UPDATE_SCALE, column_scale[at:], guess, sums[0, at:],
                sums[1, at:], sums[2, at:],
            )  # fmt: skip
            for kind in range(3):
                row_sums[kind, alone] += alone_totals[kind]
    for kind in range(3):
        for i in range(row, stop):
            row_sums[kind, i] *= UPDATE_UNSCALE


@Kernel
def add_instability_sums(
    grad, momentum, block_scales, geometry, tiles, row_scale, column_scale, inverse_guesses,
    row_sums, column_sums, partial, threads,
):  # fmt: skip
    """Pass 2: sums of e^2, u e and u^2, where e = u/d0 - m.

    As in pass 1, but that ``row_sums`` are (3, batch rows) and ``column_sums`` (3, batch, columns),
    of vectors (3, batch, 0). Momentum is fp32, bf16 or int8, which has ``block_scales``;
    ``row_scale`` (batch rows,), ``column_scale`` (batch, columns) and 1/d0 of each matrix are fp32.
    """
    count = len(tiles)
    for thread in prange(threads):
        # Only int8 needs it: rows of momentum in fp32.
        scratch = np.empty(
            (AT_ONCE, min(geometry.columns, _WIDTH) if momentum.itemsize == 1 else 0), np.float32
        )
        first, end = count * thread // threads, count * (thread + 1) // threads
        for step in range(end - first):
            number = end - 1 - step  # backwards: what pass 1 read last is still in the cache
            matrix, row, stop = tiles[number]
            _instability_tile(
                grad, momentum, block_scales, geometry, row, stop, row_scale,
                column_scale[matrix], inverse_guesses[matrix], row_sums, partial[number], scratch,
            )  # fmt: skip
    for kind in range(3):
        _add_tiles(tiles, partial, kind, UPDATE_UNSCALE, column_sums[kind])
