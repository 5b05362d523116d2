"""Schedules: which kernel is launched over which rows of its table, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, auto
from typing import NamedTuple, Self

import numpy as np

from megatron_came.kernels.triton.tables import IntTable
from megatron_came.kernels.triton.tiling import Block


class Kernel(IntEnum):
    """The kernels, in the order of the passes, and the rows of which table they take."""

    SQUARE_VECTORS = 0  # vectors: write g^2 to the buffer of sums
    SQUARE_TILES = auto()  # tiles: sum g^2 over rows and columns
    ADD_SQUARE_STRIPS = auto()  # strips: add the tiles' sums to the buffer of sums
    UPDATE_VECTOR_MOMENTS = auto()  # vectors: v; sum u^2
    UPDATE_SECOND_MOMENTS = auto()  # factors: r and c; scales of u; guess of the clip divisor
    INSTABILITY_TILES = auto()  # tiles: sum e^2, u e and u^2 over rows and columns
    ADD_INSTABILITY_STRIPS = auto()  # strips: add the tiles' sums to the buffer of sums
    SUM_SQUARED_UPDATES = auto()  # matrices: sum u^2
    APPLY_VECTORS = auto()  # vectors: momentum and weights
    UPDATE_INSTABILITIES = auto()  # factors: clip divisor; R and C; scales of the confidence
    APPLY_TILES = auto()  # tiles: momentum and weights
    APPLY_SPANS = auto()  # spans: int8 momentum and weights


class LaunchField(IntEnum):
    """Columns of a schedule."""

    KERNEL = 0
    FIRST = 1  # row of its table; the first tile has slot 0
    STOP = 2
    BACKWARDS = 3  # whether the last rows are best taken first


Schedule = IntTable


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
        blocks: Sequence[Block],
        first_factors: Sequence[int],
        first_spans: Sequence[int],
        vectors: int,
        is_int8: bool,
    ) -> Self:
        """Write the schedules.

        Args:
            blocks: of the matrix parameters.
            first_factors: by matrix parameter, the first row of its factors, and the end.
            first_spans: likewise, of its spans.
            vectors: how many vector parameters.
            is_int8: whether the momentum is.
        """
        all_vectors = slice(0, vectors)
        squares = [_launch(Kernel.SQUARE_VECTORS, all_vectors)]
        instability = [_launch(Kernel.UPDATE_VECTOR_MOMENTS, all_vectors)]
        apply = [_launch(Kernel.APPLY_VECTORS, all_vectors)]
        step = squares + instability + apply
        for block in blocks:
            members = block.matrices
            factors = slice(first_factors[members.start], first_factors[members.stop])
            spans_of = slice(first_spans[members.start], first_spans[members.stop])
            first: list[list[int]] = []
            second = [_launch(Kernel.UPDATE_SECOND_MOMENTS, factors)]
            for tiles, strips in block.segments:
                first.append(_launch(Kernel.SQUARE_TILES, tiles))
                first.append(_launch(Kernel.ADD_SQUARE_STRIPS, strips))
            # What was read last is still in the cache.
            for tiles, strips in reversed(block.segments):
                second.append(_launch(Kernel.INSTABILITY_TILES, tiles, backwards=True))
                second.append(_launch(Kernel.ADD_INSTABILITY_STRIPS, strips))
            second.append(_launch(Kernel.SUM_SQUARED_UPDATES, members))
            third = [_launch(Kernel.UPDATE_INSTABILITIES, factors)]
            if is_int8:
                third.append(_launch(Kernel.APPLY_SPANS, spans_of))
            else:
                # Cut as in the other passes, so that the same threads take the same tiles.
                third += [_launch(Kernel.APPLY_TILES, tiles) for tiles, _ in block.segments]
            squares += first
            instability += second
            apply += third
            step += first + second + third
        return cls(*map(_schedule, (squares, instability, apply, step)))


def _launch(kernel: Kernel, rows: slice, backwards: bool = False) -> list[int]:
    return [kernel, rows.start, rows.stop, backwards]


def _schedule(launches: list[list[int]]) -> Schedule:
    """Put launches together, but for those of no rows."""
    table = np.array(launches, np.int64).reshape(-1, len(LaunchField))
    wanted = table[:, LaunchField.STOP] > table[:, LaunchField.FIRST]
    # Kernels are given its address; NumPy does not say how it lays out what it picks.
    return np.ascontiguousarray(table[wanted])
