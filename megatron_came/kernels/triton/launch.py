"""Launches: which kernel over which rows of its table, in which order, with which arguments.

The arguments of kernels are named as what tables and sizes there are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple, Self

from megatron_came.kernels.triton import blocks, factors, tiles, vectors
from megatron_came.kernels.triton.tables import Kind
from megatron_came.kernels.triton.tiling import MatrixSet, Tiling

# Of the kernels that take tiles or blocks: each warp has a row, or a block, at a time.
WARPS = STEP = 8
# With so many, an SM of 65536 holds 24 warps.
REGISTERS = 80
# Elements of a vector or of a range of a factor, and tiles of an addition, that are read at once.
BLOCK, ADDITION_TILES = 1024, 16
# Elements of a vector in pass 3: of more, registers do not hold what it reads.
APPLIED = 512
# Ranges of a factor, and row sums, that are added up at once.
RANGES, MANY = 128, 4096


class Launch(NamedTuple):
    """A kernel over rows of the table that it takes.

    Attributes:
        kernel: one of those of ``tiles``, ``blocks``, ``factors`` and ``vectors``.
        rows: of the table.
        constants: what is compiled into it beside sizes.
        sums: how many kinds of sums are added, by programs of their own.
    """

    kernel: Any
    rows: slice
    constants: Mapping[str, Any] = {}
    sums: int = 1


Schedule = Sequence[Launch]


class Owners(NamedTuple):
    """To which matrix parameter the rows of tables belong, and of which kind each is."""

    tiles: Sequence[int]
    blocks: Sequence[int]
    factors: Sequence[int]
    kinds: Sequence[Kind] = ()

    def launches(self, kernel: Any, rows: slice, owners: Sequence[int]) -> Iterator[Launch]:
        """Launch a kernel once for as many rows as are of one kind, as far as it compiles that in.

        Int8 momentum in blocks that are not rows of tiles is not updated tile by tile.
        """

        def constants(row: int) -> dict[str, Any]:
            kind = self.kinds[owners[row]]._asdict()
            return {name: kind[name] for name in kernel.arg_names if name in kind}

        for own, group in groupby(range(rows.start, rows.stop), constants):
            some = [*group]
            if kernel is not tiles.apply_tiles or own["INT8"] != 2:
                yield Launch(kernel, slice(some[0], some[-1] + 1), own)


class Schedules(NamedTuple):
    """What to launch in each pass.

    Attributes:
        squares: pass 1.
        instability: second moments and pass 2.
        apply: instabilities and pass 3.
        step: all passes, where all sums are local.
    """

    squares: Schedule
    instability: Schedule
    apply: Schedule
    step: Schedule

    @classmethod
    def of(cls, sets: Sequence[MatrixSet], owners: Owners, vector_count: int) -> Self:
        """Write the schedules.

        Args:
            sets: of the matrix parameters.
            owners: of the tables' rows.
            vector_count: how many vector parameters.
        """
        all_vectors = slice(0, vector_count)
        squares = [Launch(vectors.square_vectors, all_vectors)]
        instability = [Launch(vectors.update_vector_moments, all_vectors)]
        apply = [Launch(vectors.apply_vectors, all_vectors)]
        step = squares + instability + apply
        pass_1, pass_2 = {"SQUARES": True}, {"SQUARES": False}
        for matrices, fills in sets:
            of_factors = _rows_of(matrices, owners.factors)
            of_blocks = _rows_of(matrices, owners.blocks)
            first: list[Launch] = []
            for some, additions in fills:
                first += owners.launches(tiles.square_tiles, some, owners.tiles)
                first.append(Launch(tiles.add_tile_sums, additions, pass_1))
            second = [
                Launch(factors.update_second_moments, of_factors),
                Launch(factors.scale_factors, of_factors, pass_1),
            ]
            # What was read last is still in the cache.
            for some, additions in reversed(fills):
                launches = owners.launches(tiles.instability_tiles, some, owners.tiles)
                second += reversed([*launches])
                second.append(Launch(tiles.add_tile_sums, additions, pass_2, sums=3))
            second.append(Launch(factors.sum_squared_updates, matrices))
            third = [
                Launch(factors.update_instabilities, of_factors),
                Launch(factors.scale_factors, of_factors, pass_2),
            ]
            # Cut as in the other passes, so that the same processors take the same tiles.
            for some, _ in fills:
                third += owners.launches(tiles.apply_tiles, some, owners.tiles)
            third += owners.launches(blocks.apply_blocks, of_blocks, owners.blocks)
            squares += first
            instability += second
            apply += third
            step += first + second + third
        return cls(*map(_with_rows, (squares, instability, apply, step)))


def _rows_of(matrices: slice, owners: Sequence[int]) -> slice:
    """Return the rows of a table, which is in the order of its owners, of some of these."""
    return slice(bisect_left(owners, matrices.start), bisect_left(owners, matrices.stop))


def _with_rows(launches: Sequence[Launch]) -> Schedule:
    return [each for each in launches if each.rows.stop > each.rows.start]


@dataclass(slots=True)
class Tables:
    """What the kernels read and write, on their device; see ``kernels.triton.tables``.

    Arrays lie in one piece, row by row: kernels are given their addresses.

    Attributes:
        tiling: how the matrices are cut.
        matrices: table of ``ParamField``.
        vectors: table of ``ParamField``.
        tiles: table of ``TileField``.
        blocks: table of ``BlocksField``; empty unless momentum is int8.
        additions: table of ``AdditionField``.
        factors: table of ``FactorField``.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        partials: (factors, 2), float64.
        scratch: of ``tiling.tile_floats`` for each tile, fp32.
    """

    tiling: Tiling
    matrices: Any
    vectors: Any
    tiles: Any
    blocks: Any
    additions: Any
    factors: Any
    groups: Any
    divisors: Any
    partials: Any
    scratch: Any

    @property
    def addresses(self) -> list[int]:
        """Where the arrays lie: all that changes of the arguments while the tiling stays."""
        return [getattr(self, name).data_ptr() for name in _ARRAYS]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of kernels, by name, but those of a launch."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | constants(self.tiling)


_ARRAYS = [field.name for field in fields(Tables) if field.name != "tiling"]


def constants(tiling: Tiling) -> dict[str, int]:
    """Return the sizes that are compiled into kernels, by name."""
    return {
        "COLUMNS": tiling.columns,
        "STEP": STEP,
        "TILES": ADDITION_TILES,
        "COUNT": tiling.addition,
        "BLOCK": BLOCK,
        "APPLIED": APPLIED,
        "RANGES": RANGES,
        "MANY": MANY,
    }


def options_of(kernel: Any) -> dict[str, int]:
    """Return how Triton is to compile a kernel; those over factors have small programs."""
    is_of_factors = "factors" in kernel.arg_names
    return {"num_warps": 4 if is_of_factors else WARPS, "maxnreg": REGISTERS}


def run(tables: Tables, schedule: Schedule) -> None:
    """Launch what a schedule lists, on the current stream of the current device."""
    arguments = tables.arguments
    for kernel, rows, constants, sums in schedule:
        given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        given |= constants
        kernel[rows.stop - rows.start, sums](rows.start, **given, **options_of(kernel))
