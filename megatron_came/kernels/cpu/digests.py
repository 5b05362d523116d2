"""Adding up digests on a CPU, at the speed of its memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import carray, types
from torch import Tensor

from megatron_came.core.digests import add_up
from megatron_came.kernels.cpu.compiling import inline, to_int16, to_int32, to_int64
from megatron_came.kernels.cpu.keeping import compile_and_keep

_Task = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)


@inline
def _row(bits, keys):
    """Return the sum of 32-bit products: processors have an instruction for these."""
    total = np.int64(0)
    for column in range(bits.size):
        total += np.int64(bits[column]) * np.int64(keys[column])
    return total


def _add_up(address):
    width, rows, columns, stride, bits, row_keys, column_keys = carray(
        address, (7,), dtype=np.int64
    )
    heights = carray(to_int64(row_keys), (rows,))
    keys = carray(to_int32(column_keys), (columns,))
    total = np.int64(0)
    for row in range(rows):
        if heights[row] == 0:
            continue
        start = bits + row * stride * width
        if width == 4:
            total += heights[row] * _row(carray(to_int32(start), (columns,)), keys)
        else:
            total += heights[row] * _row(carray(to_int16(start), (columns,)), keys)
    return total


@cache
def _compiled() -> tuple[object, Callable[[int], int]]:
    """Compile :func:`_add_up`, or load it from Numba's cache; kept together with its address."""
    function, _ = compile_and_keep(_add_up, types.int64(types.voidptr))
    address = function.address  # of what is kept
    assert address is not None
    return function, _Task(address)


def add_up_fast(bits: Tensor, rows: Tensor, columns: Tensor) -> Tensor | int:
    """:func:`megatron_came.core.digests.add_up`, of 16- and 32-bit integers on a CPU."""
    _, call = _compiled()
    width = bits.element_size()
    if width not in (2, 4) or bits.stride(1) != 1:
        return add_up(bits, rows, columns)
    addresses = (bits.data_ptr(), rows.data_ptr(), columns.data_ptr())
    task = np.array([width, *bits.shape, bits.stride(0), *addresses], np.int64)
    return call(task.ctypes.data)
