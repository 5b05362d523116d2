"""The Numba kernels on threads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.core.parameter_slice import ParameterSlice, SliceSums
from megatron_came.kernels.backend import unsupported_by_kernels
from megatron_came.kernels.cpu import threads
from megatron_came.kernels.cpu.task import TaskField, compiled
from megatron_came.kernels.cpu.tiles import room_elements
from megatron_came.kernels.triton.fused import FusedPasses, Tables
from megatron_came.kernels.triton.schedule import LaunchField, Schedule
from megatron_came.kernels.triton.tables import GroupField
from megatron_came.kernels.triton.tiling import Tiling

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3")
# Where the system does not say how large it is.
_USUAL_CACHE = 16 * 2**20


class NumbaBackend:
    """:class:`megatron_came.kernels.backend.Backend` for the CPU.

    PyTorch's threads (``torch.get_num_threads``) share every schedule. Making one compiles the
    kernels, or loads them from Numba's cache.

    Attributes:
        note: what of that did not go as it should, in a sentence; empty if all did.
    """

    name = "numba"
    written_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    # Rows are read whole where they are no longer than this: memory read in pieces, with gaps
    # between them, is read at half the speed.
    tiling = Tiling(rows=64, columns=4096, slots=256, strip=64, stretch=4)

    def __init__(self) -> None:
        function, self.note = compiled()
        address = function.address  # of what ``compiled`` keeps
        assert address is not None
        self._take_part = address
        self._scratch = np.empty(0, np.float32)
        self._room = np.empty(
            (0, 4, room_elements(self.tiling.columns, self.tiling.span)), np.float32
        )

    @property
    def cache_elements(self) -> int:
        """What the last-level caches hold of gradient and momentum."""
        return _last_caches(threads.usable()) // 8

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Nothing beyond what hinders all kernels."""
        return unsupported_by_kernels(slice_)

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> FusedPasses:
        """Make the passes, with tables of these parameters."""
        return FusedPasses(sums, self, is_local)

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

    def count_step(self, tables: Tables) -> None:
        """Add one to all groups' steps."""
        tables.groups[:, GroupField.STEP] += 1

    def scratch(self, slots: int, sums: int) -> npt.NDArray[np.float32]:
        """Return the buffer, grown if need be."""
        numel = slots * 3 * sums
        if numel > self._scratch.size:
            self._scratch = np.empty(numel, np.float32)
        return self._scratch[:numel].reshape(slots, 3, sums)

    def run(self, tables: Tables, schedule: Schedule) -> None:
        """Work off a schedule on threads."""
        if not len(schedule):
            return
        rows = schedule[:, LaunchField.STOP] - schedule[:, LaunchField.FIRST]
        # One row is for one thread; any other number than all would end threads.
        count = threads.usable() if rows.max() > 1 else 1
        if count > len(self._room):
            self._room = np.empty((count, *self._room.shape[1:]), np.float32)
        arrays = {
            TaskField.LAUNCHES: schedule,
            TaskField.COUNTERS: np.zeros((len(schedule), count + 1), np.int64),
            TaskField.MATRICES: tables.matrices,
            TaskField.VECTORS: tables.vectors,
            TaskField.TILES: tables.tiles,
            TaskField.SPANS: tables.spans,
            TaskField.STRIPS: tables.strips,
            TaskField.FACTORS: tables.factors,
            TaskField.GROUPS: tables.groups,
            TaskField.DIVISORS: tables.divisors,
            TaskField.SCRATCH: tables.scratch,
        }
        fields = {
            TaskField.THREADS: (0, count),
            TaskField.TILE: (tables.tiling.slot_rows, tables.tiling.columns),
            TaskField.ROOM: (self._room.ctypes.data, self._room.shape[2]),
            **{field: (array.ctypes.data, len(array)) for field, array in arrays.items()},
        }
        task = np.array([fields[field] for field in TaskField], np.int64)
        threads.run(self._take_part, task.ctypes.data, count)


def _last_caches(count: int) -> int:
    """Bytes of the last-level caches of the processors that so many threads keep busy."""
    try:
        size = (_CACHE / "size").read_text().strip().removesuffix("K")
        spans = [span.split("-") for span in (_CACHE / "shared_cpu_list").read_text().split(",")]
        sharing = sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
        return int(size) * 1024 * max(count // sharing, 1)
    except (ArithmeticError, OSError, ValueError):  # not on every system
        return _USUAL_CACHE
