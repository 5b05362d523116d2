"""Adding up digests on a CPU, at the speed of its memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import carray

from megatron_came.core.digests import Term, add_up
from megatron_came.kernels.cpu.compiling import inline, serial, to_int16, to_int32, to_int64

# Columns of a task: bytes of an element, rows, columns, elements from row to row, addresses of the
# first element and of the keys of rows and columns; and the sum.
_COLUMNS = 8
# Elements that a thread takes at once, if there are several: about as long as starting it takes.
_TAKEN = 1 << 20


@inline
def _row(bits, keys):
    """Return the sum of 32-bit products: processors have an instruction for these."""
    total = np.int64(0)
    for column in range(bits.size):
        total += np.int64(bits[column]) * np.int64(keys[column])
    return total


@serial
def _fill(table):
    """Write sums into the last column."""
    for line in range(len(table)):
        width, rows, columns, stride, bits, row_keys, column_keys, _ = table[line]
        heights = carray(to_int64(row_keys), (rows,))
        keys = carray(to_int32(column_keys), (columns,))
        total = np.int64(0)
        for row in range(rows):
            start = bits + row * stride * width
            if width == 4:
                total += heights[row] * _row(carray(to_int32(start), (columns,)), keys)
            else:
                total += heights[row] * _row(carray(to_int16(start), (columns,)), keys)
        table[line, 7] = total


def add_up_fast(terms: Sequence[Term]) -> list[int]:
    """:func:`megatron_came.core.digests.add_up`, on a CPU and as many threads as PyTorch uses."""
    sums = [0] * len(terms)
    lines: list[tuple[int, ...]] = []
    owners: list[int] = []
    others: list[int] = []
    for index, (bits, matrix, _) in enumerate(terms):
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
                )
            )
            owners.append(index)
    table = np.array(lines, np.int64).reshape(-1, _COLUMNS)
    _fill_on_threads(table)
    for index, total in zip(owners, table[:, -1].tolist(), strict=True):
        sums[index] += total << terms[index].shift
    for index, total in zip(others, add_up([terms[index] for index in others]), strict=True):
        sums[index] = total
    return sums


def _fill_on_threads(table) -> None:
    """Write sums into the last column; the order of lines does not matter."""
    sizes = np.cumsum(table[:, 1] * table[:, 2])
    count = torch.get_num_threads()
    if count == 1 or not len(sizes) or sizes[-1] <= _TAKEN:
        _fill(table)
        return
    ends = np.searchsorted(sizes, np.arange(_TAKEN, sizes[-1], _TAKEN)) + 1
    with ThreadPoolExecutor(count) as threads:  # the calls hold no lock of Python's
        list(threads.map(_fill, np.split(table, np.unique(ends))))
