"""Schedules: which kernel is launched over which rows of its table, and in which order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Self

from megatron_came.kernels.triton import blocks, factors, tiles, vectors
from megatron_came.kernels.triton.tables import Kind
from megatron_came.kernels.triton.tiling import MatrixSet


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
