"""What Python calls: a schedule of launches, which any number of threads work off together.

Every thread has a share of a launch's rows, the same in all passes, so that it finds in the cache
of its own processor what it has read before. It takes rows of it until none is left, then of the
others' shares, and waits until those that others have taken are done before it goes on to the next
launch. A thread that comes late holds up nobody; one that the system holds up delays the others by
the rows that it has taken alone. No order of the threads changes a bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from megatron_came.kernels import tables
from megatron_came.kernels.numba import compiling, factors, storage, tiles, updates, vectors
from megatron_came.kernels.numba.compiling import inline, unowned
from megatron_came.kernels.schedule import Kernel
from megatron_came.kernels.schedule import LaunchField as Launch
from megatron_came.maths import int8

# Rows are taken in portions of which every thread gets so many, if there are enough.
_PORTIONS = 32
# A thread that waits looks so often before it lets others run.
_LOOKS = 256

# Numba's cache knows a function by its own file; what it calls, and the tables' columns, are in
# others. Those that are imported with this one may be read from their files, the others not: the
# files may have changed since.
_TABLES = (*tables.TABLES, Kernel, Launch)
_FIELDS = repr([(table.__name__, list(table.__members__.items())) for table in _TABLES])
_SOURCES = (compiling, storage, tiles, factors, updates, vectors)
_FILES = [Path(str(source.__file__)).read_bytes() for source in _SOURCES]
_FINGERPRINT = zlib.crc32(b"".join([*_FILES, _FIELDS.encode(), str(int8.BLOCK).encode()]))


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


def _run(
    launches,
    counters,
    thread,
    matrices,
    vector_table,
    tile_table,
    spans,
    strips,
    factor_table,
    groups,
    divisors,
    scratch,
    room,
    tile_rows,
    tile_columns,
):
    """Take part in a schedule, until all of it is done.

    Nothing may be raised between taking rows and having done them, such as for want of memory: the
    other threads would wait for ever.

    Args:
        launches: table of ``LaunchField``.
        counters: (launches, threads + 1), int64, zeros: rows taken of each thread's share of a
            launch, and rows done. The same for all threads.
        thread: which of them this one is.
        matrices: table of ``MatrixField``.
        vector_table: table of ``VectorField``.
        tile_table: table of ``TileField``.
        spans: table of ``SpanField``.
        strips: table of ``StripField``.
        factor_table: (matrices, 2): matrix parameter, place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32.
        scratch: (slots, 3, tile_rows + tile_columns), fp32.
        room: (threads, 4, elements), fp32, see ``tiles.buffers_in``.
        tile_rows: of the tallest tile.
        tile_columns: of a tile, at most.
    """
    launches, matrices = unowned(launches), unowned(matrices)
    vector_table, tile_table = unowned(vector_table), unowned(tile_table)
    spans, strips, factor_table = unowned(spans), unowned(strips), unowned(factor_table)
    groups, divisors, scratch = unowned(groups), unowned(divisors), unowned(scratch)
    buffers = tiles.buffers_in(room[thread])
    threads = counters.shape[1] - 1
    for index in range(len(launches)):
        kernel, origin = launches[index, Launch.KERNEL], launches[index, Launch.FIRST]
        count = launches[index, Launch.STOP] - origin
        portion = max(count // (_PORTIONS * threads), 1)
        taken = counters.ctypes.data + 8 * index * (threads + 1)
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


_run.__qualname__ += f"_{_FINGERPRINT}"
# As in PyTorch, a division by zero gives infinity or NaN.
run: Callable[..., None] = njit(nogil=True, cache=True, error_model="numpy")(_run)
