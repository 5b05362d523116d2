"""What every thread runs: its part in a task, a schedule of launches over tables.

A thread has a share of a launch's rows, the same in all passes, so that it finds in the cache of
its own processor what it has read before. It takes rows of it until none is left, then of the
others' shares, and waits until those that others have taken are done before it goes on to the next
launch. A thread that comes late, or not at all, delays no launch; one that the system holds up
delays the others by the rows that it has taken alone, and the end of all, for which every thread
that comes is waited. No order of the threads changes a bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import zlib
from enum import IntEnum, auto
from functools import cache
from pathlib import Path

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types
from numba.extending import intrinsic

from megatron_came.core import int8
from megatron_came.kernels.cpu import compiling, factors, storage, tiles, updates, vectors
from megatron_came.kernels.cpu.compiling import inline, to_float32, to_float64, to_int64
from megatron_came.kernels.cpu.keeping import Compiled, compile_and_keep
from megatron_came.kernels.triton import tables
from megatron_came.kernels.triton.schedule import Kernel
from megatron_came.kernels.triton.schedule import LaunchField as Launch

# Rows are taken in portions of which every thread gets so many, if there are enough.
_PORTIONS = 32
# A thread that waits looks so often before it lets others run.
_LOOKS = 256


class TaskField(IntEnum):
    """Rows of a task, what threads share: address and length of an array, unless said otherwise.

    Tables are as in ``megatron_came.kernels.triton.fused.Tables``.
    """

    THREADS = 0  # how many have come, and for how many there are shares; both numbers
    TILE = auto()  # rows of the tallest tile, columns of the widest; both numbers
    ROOM = auto()  # (threads, 4, elements), fp32, see tiles.buffers_in; address, elements
    LAUNCHES = auto()  # table of LaunchField
    COUNTERS = auto()  # (launches, threads + 1), int64: rows taken of each share, and rows done
    MATRICES = auto()
    VECTORS = auto()
    TILES = auto()
    SPANS = auto()
    STRIPS = auto()
    FACTORS = auto()
    GROUPS = auto()
    DIVISORS = auto()
    SCRATCH = auto()


_TASK_FIELDS = len(TaskField)

# Numba's cache knows a function by its own file; what it calls, and the tables' columns, are in
# others. Those that are imported with this one may be read from their files, the others not: the
# files may have changed since.
_TABLES = (*tables.TABLES, Kernel, Launch)
_FIELDS = repr([(table.__name__, list(table.__members__.items())) for table in _TABLES])
_SOURCES = (compiling, storage, tiles, factors, updates, vectors)
_FILES = [Path(str(source.__file__)).read_bytes() for source in _SOURCES]
_LIMITS = (compiling.LARGEST_MEAN, compiling.LEAST_RATIO, compiling.BAD_GUESS, int8.BLOCK)
_FINGERPRINT = zlib.crc32(b"".join([*_FILES, _FIELDS.encode(), repr(_LIMITS).encode()]))


@intrinsic
def _add(_context, address, amount):
    """Add to a counter that all threads see; returns what it was."""

    def generate(_context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _read(_context, address):
    """Read such a counter."""

    def generate(_context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def _let_others_run(_context):
    """``sched_yield`` of the C library."""

    def generate(_context, builder, _signature, _args):
        kind = ir.FunctionType(ir.IntType(32), ())
        module = builder.module
        function = module.globals.get("sched_yield") or ir.Function(module, kind, "sched_yield")
        return builder.call(function, ())

    return types.int32(), generate


@inline
def _wait(address, count):
    looks = 0
    while _read(address) < count:
        looks += 1
        if looks > _LOOKS:
            _let_others_run()


def _array(field, pointer, *inner):
    """Return a function that views an array of a task, whose inner dimensions are known."""

    @inline
    def array_of(task):
        return carray(pointer(task[field, 0]), (task[field, 1], *inner))

    return array_of


_launches_of = _array(TaskField.LAUNCHES, to_int64, len(Launch))
_matrices_of = _array(TaskField.MATRICES, to_int64, len(tables.MatrixField))
_vectors_of = _array(TaskField.VECTORS, to_int64, len(tables.VectorField))
_tiles_of = _array(TaskField.TILES, to_int64, len(tables.TileField))
_spans_of = _array(TaskField.SPANS, to_int64, len(tables.SpanField))
_strips_of = _array(TaskField.STRIPS, to_int64, len(tables.StripField))
_factors_of = _array(TaskField.FACTORS, to_int64, 2)
_groups_of = _array(TaskField.GROUPS, to_float64, len(tables.GroupField))
_divisors_of = _array(TaskField.DIVISORS, to_float32, 2)


def _take_part(address):
    """Take part in a task, until all of it is done.

    Nothing may be raised between taking rows and having done them, such as for want of memory: the
    other threads would wait for ever.

    Args:
        address: of the task, a table of ``TaskField``, (fields, 2), int64.
    """
    task = carray(address, (_TASK_FIELDS, 2), types.int64)
    thread = _add(task.ctypes.data, 1)
    threads = task[TaskField.THREADS, 1]
    tile_rows, tile_columns = task[TaskField.TILE]
    launches = _launches_of(task)
    counters = task[TaskField.COUNTERS, 0]
    matrices = _matrices_of(task)
    vector_table = _vectors_of(task)
    tile_table = _tiles_of(task)
    spans = _spans_of(task)
    strips = _strips_of(task)
    factor_table = _factors_of(task)
    groups = _groups_of(task)
    divisors = _divisors_of(task)
    slots = task[TaskField.SCRATCH, 1]
    scratch = carray(to_float32(task[TaskField.SCRATCH, 0]), (slots, 3, tile_rows + tile_columns))
    elements = task[TaskField.ROOM, 1]
    buffers = tiles.buffers_in(task[TaskField.ROOM, 0] + 16 * thread * elements, elements)
    for index in range(len(launches)):
        kernel, origin = launches[index, Launch.KERNEL], launches[index, Launch.FIRST]
        count = launches[index, Launch.STOP] - origin
        portion = max(count // (_PORTIONS * threads), 1)
        taken = counters + 8 * index * (threads + 1)
        done = taken + 8 * threads
        for step in range(threads):
            share = (thread + step) % threads
            low = origin + count * share // threads
            high = origin + count * (share + 1) // threads
            while _read(taken + 8 * share) < high - low:
                begin = _add(taken + 8 * share, portion)
                if begin >= high - low:
                    break
                end = min(begin + portion, high - low)
                first, stop = low + begin, low + end
                if launches[index, Launch.BACKWARDS]:
                    first, stop = high - end, high - begin
                if kernel == Kernel.SQUARE_TILES:
                    tiles.square_tiles(
                        first, stop, origin, matrices, tile_table, scratch, tile_rows, tile_columns,
                        buffers,
                    )  # fmt: skip
                elif kernel == Kernel.ADD_SQUARE_STRIPS:
                    tiles.add_square_strips(first, stop, strips, scratch)
                elif kernel == Kernel.UPDATE_SECOND_MOMENTS:
                    factors.update_second_moments(
                        first, stop, matrices, factor_table, groups, divisors
                    )
                elif kernel == Kernel.INSTABILITY_TILES:
                    tiles.instability_tiles(
                        first, stop, origin, matrices, tile_table, divisors, scratch, tile_rows,
                        tile_columns, buffers,
                    )  # fmt: skip
                elif kernel == Kernel.ADD_INSTABILITY_STRIPS:
                    tiles.add_instability_strips(first, stop, strips, scratch)
                elif kernel == Kernel.SUM_SQUARED_UPDATES:
                    factors.sum_squared_updates(first, stop, matrices)
                elif kernel == Kernel.UPDATE_INSTABILITIES:
                    factors.update_instabilities(
                        first, stop, matrices, factor_table, groups, divisors
                    )
                elif kernel == Kernel.APPLY_TILES:
                    updates.apply_tiles(
                        first, stop, matrices, tile_table, groups, divisors, tile_columns, buffers
                    )
                elif kernel == Kernel.APPLY_SPANS:
                    updates.apply_spans(first, stop, matrices, spans, groups, divisors, buffers)
                elif kernel == Kernel.SQUARE_VECTORS:
                    vectors.square_vectors(first, stop, vector_table, buffers)
                elif kernel == Kernel.UPDATE_VECTOR_MOMENTS:
                    vectors.update_vector_moments(first, stop, vector_table, groups, buffers)
                elif kernel == Kernel.APPLY_VECTORS:
                    vectors.apply_vectors(first, stop, vector_table, groups, buffers)
                _add(done, end - begin)
        _wait(done, count)


_take_part.__qualname__ += f"_{_FINGERPRINT}"


@cache
def compiled() -> Compiled:
    """Compile :func:`_take_part`, or load it from Numba's cache."""
    return compile_and_keep(_take_part, types.void(types.voidptr))
