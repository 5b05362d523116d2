"""Adding up digests on a CPU, at the speed of its memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import carray

from megatron_came.core.digests import INFINITY, Added, Term, add_up, signed
from megatron_came.kernels.cpu.compiling import inline, serial, to_int16, to_int32, to_int64

# Columns of a task: bytes of an element, rows, columns, elements from row to row, addresses of the
# first element and of the keys of rows and columns, the lowest bit of each exponent in 64 bits; the
# sum, and 0 if all elements are finite.
_COLUMNS = 10
# The sign bits of the numbers in a word of 64 bits.
_SIGNS_OF_4 = np.int64(signed(0x8000000080000000))
_SIGNS_OF_2 = np.int64(signed(0x8000800080008000))
# Elements of a row that are read before those of the next: these and their keys stay in the cache.
_SIDE_BY_SIDE = 1 << 12
# Elements that a thread takes at once, if there are several: about as long as starting it takes.
_TAKEN = 1 << 22


@inline
def _low(word):
    """Return the lower 32 bits of 64, with their sign."""
    return (word << 32) >> 32


@inline
def _full(word, signs, lowest):
    """Return a word with the sign of each number whose exponent has all its bits.

    To add an exponent's lowest bit carries into the sign then, and no further.
    """
    return ((word & ~signs) + lowest) & signs


@inline
def _rows_of_4_bytes(rows, keys, columns, lowest):
    """Return sums of four rows' 32-bit products, and what is full.

    Processors have an instruction for the product of the lower halves of 64-bit words, so these
    are read whole.
    """
    half = columns // 2
    pairs = carray(to_int64(keys), (half,))
    a, b = carray(to_int64(rows[0]), (half,)), carray(to_int64(rows[1]), (half,))
    c, d = carray(to_int64(rows[2]), (half,)), carray(to_int64(rows[3]), (half,))
    of_a = of_b = of_c = of_d = full = np.int64(0)
    for i in range(half):
        low, high = _low(pairs[i]), pairs[i] >> 32
        of_a += _low(a[i]) * low + (a[i] >> 32) * high
        of_b += _low(b[i]) * low + (b[i] >> 32) * high
        of_c += _low(c[i]) * low + (c[i] >> 32) * high
        of_d += _low(d[i]) * low + (d[i] >> 32) * high
        full |= _full(a[i], _SIGNS_OF_4, lowest) | _full(b[i], _SIGNS_OF_4, lowest)
        full |= _full(c[i], _SIGNS_OF_4, lowest) | _full(d[i], _SIGNS_OF_4, lowest)
    if columns % 2:
        last = 4 * (columns - 1)
        key = np.int64(to_int32(keys + last)[0])
        e, f = np.int64(to_int32(rows[0] + last)[0]), np.int64(to_int32(rows[1] + last)[0])
        g, h = np.int64(to_int32(rows[2] + last)[0]), np.int64(to_int32(rows[3] + last)[0])
        of_a, of_b, of_c, of_d = of_a + e * key, of_b + f * key, of_c + g * key, of_d + h * key
        for element in (e, f, g, h):
            full |= _full(element & 0xFFFFFFFF, _SIGNS_OF_4, lowest)
    return of_a, of_b, of_c, of_d, full


@inline
def _rows_of_2_bytes(rows, keys, columns, lowest):
    """Return sums of four rows' products, and what is full."""
    some = carray(to_int32(keys), (columns,))
    a, b = carray(to_int16(rows[0]), (columns,)), carray(to_int16(rows[1]), (columns,))
    c, d = carray(to_int16(rows[2]), (columns,)), carray(to_int16(rows[3]), (columns,))
    of_a = of_b = of_c = of_d = full = np.int64(0)
    for i in range(columns):
        key = np.int64(some[i])
        of_a += np.int64(a[i]) * key
        of_b += np.int64(b[i]) * key
        of_c += np.int64(c[i]) * key
        of_d += np.int64(d[i]) * key
    for row in rows:  # in the cache now
        words = carray(to_int64(row), (columns // 4,))
        for index in range(words.size):
            full |= _full(words[index], _SIGNS_OF_2, lowest)
        for column in range(4 * words.size, columns):
            element = np.int64(to_int16(row + 2 * column)[0])
            full |= _full(element & 0xFFFF, _SIGNS_OF_2, lowest)
    return of_a, of_b, of_c, of_d, full


@inline
def _sum(four_rows, width, start, stride, heights, keys, columns, lowest):
    """Return the sum over a matrix of elements of so many bytes, and what is full.

    It takes four rows at once, a quarter of the matrix apart: a processor fetches ahead what is
    read in one go, and these are four such streams.
    """
    apart = (heights.size + 3) // 4
    total, all_full = np.int64(0), np.int64(0)
    for a in range(apart):
        b, c, d = a + apart, a + 2 * apart, a + 3 * apart
        # Rows that there are not are the first one again, and do not count.
        has_b, has_c, has_d = b < heights.size, c < heights.size, d < heights.size
        b, c, d = b * has_b, c * has_c, d * has_d
        for left in range(0, columns, _SIDE_BY_SIDE):
            first, some = start + width * left, min(columns - left, _SIDE_BY_SIDE)
            rows = first + stride * a, first + stride * b, first + stride * c, first + stride * d
            of_a, of_b, of_c, of_d, full = four_rows(rows, keys + 4 * left, some, lowest)
            total += heights[a] * of_a + has_b * heights[b] * of_b
            total += has_c * heights[c] * of_c + has_d * heights[d] * of_d
            all_full |= full
    return total, all_full


@serial
def _fill(table):
    """Write sums, and whether all is finite, into the last columns."""
    for line in range(len(table)):
        width, rows, columns, stride, start, row_keys, keys, lowest, _, _ = table[line]
        heights = carray(to_int64(row_keys), (rows,))
        if width == 4:
            found = _sum(_rows_of_4_bytes, 4, start, 4 * stride, heights, keys, columns, lowest)
        else:
            found = _sum(_rows_of_2_bytes, 2, start, 2 * stride, heights, keys, columns, lowest)
        table[line, 8], table[line, 9] = found


def add_up_fast(terms: Sequence[Term]) -> list[Added]:
    """:func:`megatron_came.core.digests.add_up`, on a CPU and as many threads as PyTorch uses."""
    sums = [Added(0, True)] * len(terms)
    lines: list[tuple[int, ...]] = []
    owners: list[int] = []
    others: list[int] = []
    for index, (bits, matrix, _, dtype) in enumerate(terms):
        width = bits.element_size()
        if width not in (2, 4):
            others.append(index)
            continue
        rows, columns = matrix.keys(bits.device)
        address, row_address = bits.data_ptr() + width * matrix.position, rows.data_ptr()
        lowest, step = _lowest_of_exponents(dtype), max(1, _TAKEN // matrix.columns)
        for top in range(0, matrix.rows, step):
            height, start = min(step, matrix.rows - top), address + width * matrix.stride * top
            keys = row_address + 8 * top, columns.data_ptr()
            lines.append((width, height, matrix.columns, matrix.stride, start, *keys, lowest, 0, 0))
            owners.append(index)
    table = np.array(lines, np.int64).reshape(-1, _COLUMNS)
    _fill_on_threads(table)
    for index, (total, found) in zip(owners, table[:, -2:].tolist(), strict=True):
        so_far = sums[index]
        total = so_far.total + (total << terms[index].shift)
        sums[index] = Added(total, so_far.is_finite and not found)
    for index, added in zip(others, add_up([terms[index] for index in others]), strict=True):
        sums[index] = added
    return sums


@cache
def _lowest_of_exponents(dtype: torch.dtype) -> int:
    """Return 64 bits in which the lowest one of each number's exponent is set; 0 of integers."""
    infinity = INFINITY.get(dtype, 0)
    bits = 8 * dtype.itemsize
    return sum((infinity & -infinity) << place for place in range(0, 64, bits))


def _fill_on_threads(table) -> None:
    """Write into the last columns; the order of lines does not matter."""
    sizes = np.cumsum(table[:, 1] * table[:, 2])
    count = torch.get_num_threads()
    if count == 1 or not len(sizes) or sizes[-1] <= _TAKEN:
        _fill(table)
        return
    ends = np.searchsorted(sizes, np.arange(_TAKEN, sizes[-1], _TAKEN)) + 1
    with ThreadPoolExecutor(count) as threads:  # the calls hold no lock of Python's
        list(threads.map(_fill, np.split(table, np.unique(ends))))
