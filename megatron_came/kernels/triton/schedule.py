"""Schedules: which kernel is launched over which rows of its table, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from megatron_came.kernels.triton import blocks, factors, tiles, vectors
from megatron_came.kernels.triton.tiling import MatrixSet


class Launch(NamedTuple):
    """A kernel over rows of the table that it takes.

    Attributes:
        kernel: one of those of ``tiles``, ``blocks``, ``factors`` and ``vectors``.
        rows: the sums of the first tile are first in the scratch buffer.
        kinds: of sums that are added: 1 for g^2; 3 for e^2, u e and u^2; 0 where none are.
    """

    kernel: Any
    rows: slice
    kinds: int = 0


Schedule = Sequence[Launch]


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
    def of(
        cls,
        sets: Sequence[MatrixSet],
        first_factors: Sequence[int],
        first_blocks: Sequence[int],
        vector_count: int,
        is_int8: bool,
    ) -> Self:
        """Write the schedules.

        Args:
            sets: of the matrix parameters.
            first_factors: by matrix parameter, the first row of its factors, and the end.
            first_blocks: likewise, of its blocks.
            vector_count: how many vector parameters.
            is_int8: whether the momentum is.
        """
        all_vectors = slice(0, vector_count)
        squares = [Launch(vectors.square_vectors, all_vectors)]
        instability = [Launch(vectors.update_vector_moments, all_vectors)]
        apply = [Launch(vectors.apply_vectors, all_vectors)]
        step = squares + instability + apply
        for matrices, fills in sets:
            of_factors = slice(first_factors[matrices.start], first_factors[matrices.stop])
            of_blocks = slice(first_blocks[matrices.start], first_blocks[matrices.stop])
            first: list[Launch] = []
            for some, additions in fills:
                first.append(Launch(tiles.square_tiles, some))
                first.append(Launch(tiles.add_tile_sums, additions, kinds=1))
            second = [Launch(factors.update_second_moments, of_factors)]
            # What was read last is still in the cache.
            for some, additions in reversed(fills):
                second.append(Launch(tiles.instability_tiles, some))
                second.append(Launch(tiles.add_tile_sums, additions, kinds=3))
            second.append(Launch(factors.sum_squared_updates, matrices))
            third = [Launch(factors.update_instabilities, of_factors)]
            if is_int8:
                third.append(Launch(blocks.apply_blocks, of_blocks))
            else:
                # Cut as in the other passes, so that the same processors take the same tiles.
                third += [Launch(tiles.apply_tiles, some) for some, _ in fills]
            squares += first
            instability += second
            apply += third
            step += first + second + third
        return cls(*map(_with_rows, (squares, instability, apply, step)))


def _with_rows(launches: Sequence[Launch]) -> Schedule:
    return [each for each in launches if each.rows.stop > each.rows.start]
