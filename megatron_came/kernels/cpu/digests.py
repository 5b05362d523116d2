"""Adding up digests on a CPU, at the speed of its memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import carray

from megatron_came.core.digests import Added, Term, add_up
from megatron_came.kernels.cpu.compiling import inline, serial, to_int16, to_int32, to_int64

# Columns of a task: bytes of an element, rows, columns, elements from row to row, addresses of the
# first element and of the keys of rows and columns; the sum, and the largest bits without sign.
_COLUMNS = 9
# Elements that a thread takes at once, if there are several: about as long as starting it takes.
_TAKEN = 1 << 20


@inline
def _row(bits, keys, without_sign):
    """Return the sum of 32-bit products, for which processors have an instruction."""
    total, largest = np.int64(0), np.int32(0)
    for column in range(bits.size):
        total += np.int64(bits[column]) * np.int64(keys[column])
        largest = max(largest, np.int32(bits[column]) & without_sign)
    return total, largest


@serial
def _fill(table):
    """Write sums, and the largest bits, into the last columns."""
    for line in range(len(table)):
        width, rows, columns, stride, bits, row_keys, column_keys, _, _ = table[line]
        heights = carray(to_int64(row_keys), (rows,))
        keys = carray(to_int32(column_keys), (columns,))
        total, largest = np.int64(0), np.int32(0)
        for row in range(rows):
            start = bits + row * stride * width
            if width == 4:
                some = carray(to_int32(start), (columns,))
                sum_of_row, largest_of_row = _row(some, keys, np.int32(0x7FFFFFFF))
            else:
                few = carray(to_int16(start), (columns,))
                sum_of_row, largest_of_row = _row(few, keys, np.int32(0x7FFF))
            total += heights[row] * sum_of_row
            largest = max(largest, largest_of_row)
        table[line, 7] = total
        table[line, 8] = largest


def add_up_fast(terms: Sequence[Term]) -> list[Added]:
    """:func:`megatron_came.core.digests.add_up`, on a CPU and as many threads as PyTorch uses."""
    sums = [Added(0, 0)] * len(terms)
    lines: list[tuple[int, ...]] = []
    owners: list[int] = []
    others: list[int] = []
    for index, (bits, matrix, _, _) in enumerate(terms):
        width = bits.element_size()
        if width not in (2, 4):
            others.append(index)
            continue
        rows, columns = matrix.keys(bits.device)
        address, row_address = bits.data_ptr() + width * matrix.position, rows.data_ptr()
        step = max(1, _TAKEN // matrix.columns)
        for top in range(0, matrix.rows, step):
            lines.append(
                (
                    width,
                    min(step, matrix.rows - top),
                    matrix.columns,
                    matrix.stride,
                    address + width * matrix.stride * top,
                    row_address + 8 * top,
                    columns.data_ptr(),
                    0,
                    0,
                )
            )
            owners.append(index)
    table = np.array(lines, np.int64).reshape(-1, _COLUMNS)
    _fill_on_threads(table)
    for index, (total, largest) in zip(owners, table[:, -2:].tolist(), strict=True):
        so_far = sums[index]
        total = so_far.total + (total << terms[index].shift)
        sums[index] = Added(total, max(so_far.largest, largest))
    for index, added in zip(others, add_up([terms[index] for index in others]), strict=True):
        sums[index] = added
    return sums


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
