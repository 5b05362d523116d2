"""The Numba kernels on threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.kernels import numba_kernels as kernels
from megatron_came.kernels.fused import Tables, is_batch_of_small, is_ordinary
from megatron_came.kernels.tables import GroupField, Segment, Tiling
from megatron_came.layout import Shard


class NumbaKernels:
    """:class:`megatron_came.kernels.fused.Kernels` for the CPU.

    As many threads as PyTorch uses (``torch.get_num_threads``) share every table.
    """

    written_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    # Rows are read whole where they are no longer than this: memory read in pieces, with gaps
    # between them, is read at half the speed.
    tiling = Tiling(rows=256, columns=4096, slots=96)
    # What one thread leaves in the cache, another seldom finds there: not worth a barrier.
    chunk_elements = None

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 1
        width = self.tiling.rows + self.tiling.columns
        self._scratch = np.empty((0, 3, width), np.float32)

    def bears(self, param: Tensor, shard: Shard) -> bool:
        """Tensors in one piece."""
        return is_ordinary(param) and not is_batch_of_small(shard)

    def place(self, table: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a copy: the original may change."""
        return table.copy()

    def on_device(self) -> AbstractContextManager[Any]:
        """Of no interest here."""
        return nullcontext()

    def aligned(self, matrices: npt.NDArray[np.int64]) -> bool:
        """Of no interest here."""
        return False

    def set_rate(self, tables: Tables, group: int, rate: Tensor) -> None:
        """Write a group's learning rate to its table."""
        tables.groups[group, GroupField.LR] = float(rate)

    def scratch(self, slots: int) -> npt.NDArray[np.float32]:
        """Return the buffer, grown if need be."""
        if slots > len(self._scratch):
            self._scratch = np.empty((slots, *self._scratch.shape[1:]), np.float32)
        return self._scratch

    def _share(self, kernel: Callable[..., None], first: int, stop: int, *args: Any) -> None:
        """Run a kernel over rows [first, stop) of a table, on all threads.

        Each takes the next batch of rows until none is left, so that one that the system holds up
        does not hold up the others.
        """
        threads = torch.get_num_threads()
        batches = iter(list(_batches(first, stop, threads)))

        def work() -> None:
            for batch in batches:
                kernel(*batch, *args)

        if self._pool is None or self._threads != threads:
            self._threads = threads
            self._pool = ThreadPoolExecutor(max(threads - 1, 1), "megatron_came")
        helpers = min(threads, stop - first) - 1
        others = [self._pool.submit(work) for _ in range(helpers)]
        work()
        for other in others:
            if not other.cancel():
                other.result()

    def square_tiles(self, tables: Tables, segment: Segment) -> None:
        """See ``numba_kernels.square_tiles``; likewise below."""
        self._share(
            kernels.square_tiles,
            segment.tiles.start,
            segment.tiles.stop,
            segment.tiles.start,
            tables.matrices,
            tables.tiles,
            tables.scratch,
            self.tiling.rows,
            self.tiling.columns,
        )

    def instability_tiles(self, tables: Tables, segment: Segment) -> None:  # noqa: D102
        self._share(
            kernels.instability_tiles,
            segment.tiles.start,
            segment.tiles.stop,
            segment.tiles.start,
            tables.matrices,
            tables.tiles,
            tables.divisors,
            tables.scratch,
            self.tiling.rows,
            self.tiling.columns,
        )

    def add_square_strips(self, tables: Tables, segment: Segment) -> None:  # noqa: D102
        strips = segment.strips
        self._share(
            kernels.add_square_strips, strips.start, strips.stop, tables.strips, tables.scratch
        )

    def add_instability_strips(self, tables: Tables, segment: Segment) -> None:  # noqa: D102
        strips = segment.strips
        self._share(
            kernels.add_instability_strips, strips.start, strips.stop, tables.strips, tables.scratch
        )

    def update_second_moments(self, tables: Tables) -> None:  # noqa: D102
        self._share_factors(kernels.update_second_moments, tables)

    def update_instabilities(self, tables: Tables) -> None:  # noqa: D102
        self._share_factors(kernels.update_instabilities, tables)

    def _share_factors(self, kernel: Callable[..., None], tables: Tables) -> None:
        self._share(
            kernel,
            0,
            len(tables.factors),
            tables.matrices,
            tables.factors,
            tables.groups,
            tables.divisors,
        )

    def total_updates(self, tables: Tables) -> None:  # noqa: D102
        kernels.total_updates(0, len(tables.matrices), tables.matrices)

    def apply_tiles(self, tables: Tables) -> None:  # noqa: D102
        self._share(
            kernels.apply_tiles,
            0,
            len(tables.tiles),
            tables.matrices,
            tables.tiles,
            tables.groups,
            tables.divisors,
            self.tiling.columns,
        )

    def square_vectors(self, tables: Tables) -> None:  # noqa: D102
        kernels.square_vectors(0, len(tables.vectors), tables.vectors)

    def update_vectors(self, tables: Tables) -> None:  # noqa: D102
        kernels.update_vectors(0, len(tables.vectors), tables.vectors, tables.groups)

    def apply_vectors(self, tables: Tables) -> None:  # noqa: D102
        kernels.apply_vectors(0, len(tables.vectors), tables.vectors, tables.groups)

    def apply_spans(self, tables: Tables) -> None:  # noqa: D102
        self._share(
            kernels.apply_spans,
            0,
            len(tables.spans),
            tables.matrices,
            tables.spans,
            tables.groups,
            tables.divisors,
            self.tiling.span,
        )


def _batches(first: int, stop: int, threads: int) -> Iterator[tuple[int, int]]:
    """Cut rows [first, stop) into batches that shrink: few calls, and all threads end together."""
    while first < stop:
        size = max((stop - first) // (2 * threads), 1) if threads > 1 else stop - first
        yield first, first + size
        first += size
