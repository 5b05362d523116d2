"""The Triton kernels and their launches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.core.int8 import BLOCK as INT8_BLOCK
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums
from megatron_came.kernels.backend import unsupported_by_kernels
from megatron_came.kernels.triton import factors, tiles, vectors
from megatron_came.kernels.triton.fused import FusedPasses, Tables
from megatron_came.kernels.triton.schedule import Kernel, Schedule
from megatron_came.kernels.triton.tables import GroupField, MatrixField
from megatron_came.kernels.triton.tiling import PLACES, Tiling

_STEP = 8  # rows of a tile that a program reads at once
_TILE_WARPS = 8
_BLOCK = 1024  # elements of a factor or vector that a program reads at once
_STRIP_TILES = 16


# A block of matrices that stay in the cache saves 12 of 32 bytes an element, and takes a launch of
# each of the kernels for matrices, from Python.
_SAVED_BYTES, _BLOCK_LAUNCHES, _LAUNCH_SECONDS = 12, 8, 5e-6


def blocks_save_time(cache_elements: int, bytes_per_second: float) -> bool:
    """Whether blocks that fill half of a cache save more time than their launches take.

    They do not where memory is fast: an H200 moves what a block saves in the time of two launches.

    Args:
        cache_elements: whose gradient and momentum fill the cache.
        bytes_per_second: between the device and its memory; 0: not known.
    """
    if not bytes_per_second:
        return False
    saved = _SAVED_BYTES * cache_elements / 2 / bytes_per_second
    return saved > _BLOCK_LAUNCHES * _LAUNCH_SECONDS


class TritonBackend:
    """:class:`megatron_came.kernels.backend.Backend` for GPUs.

    Under ``TRITON_INTERPRET=1`` for the CPU.

    Args:
        device: where the parameters lie.
    """

    name = "triton"
    written_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    tiling = Tiling(rows=64, columns=256, slots=4096, tallest=512)

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self._scratch = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def cache_elements(self) -> int | None:
        """What the L2 cache holds of gradient and momentum, where blocks of it save time."""
        if not self._is_cuda:
            return None
        device = torch.cuda.get_device_properties(self._device)
        # Older PyTorch, and some devices, do not report them.
        kilohertz = getattr(device, "memory_clock_rate", 0)
        bits = getattr(device, "memory_bus_width", 0)
        elements = device.L2_cache_size // 8
        return elements if blocks_save_time(elements, 2e3 * kilohertz * bits / 8) else None

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Beyond what hinders all kernels, places in a tile that do not fit 32 bits."""
        if slice_.shard.local_matrix[2] * self.tiling.slot_rows >= PLACES:
            return "with rows of more than 16 million elements"
        return unsupported_by_kernels(slice_)

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> FusedPasses:
        """Make the passes, with tables of these parameters."""
        return FusedPasses(sums, self, is_local)

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the parameters' device the current one, on which Triton launches."""
        return torch.cuda.device(self._device) if self._is_cuda else nullcontext()

    def place(self, table: npt.NDArray[Any]) -> Tensor:
        """Copy to the device, from pinned memory: the copy is queued, not waited for."""
        host = torch.from_numpy(table.copy())
        if not self._is_cuda:
            return host
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "CAME: a tensor or hyperparameter has changed while a CUDA graph is captured: warm "
                "up with the gradients where they will stay, and give the learning rate as a "
                "tensor on the device."
            )
        return host.pin_memory().to(self._device, non_blocking=True)

    def set_rate(self, tables: Tables, group: int, rate: Tensor) -> None:
        """Write a group's learning rate to its table, on the device."""
        tables.groups[group, GroupField.LR].copy_(rate)

    def count_step(self, tables: Tables) -> None:
        """Add one to all groups' steps, on the device."""
        tables.groups[:, GroupField.STEP].add_(1)

    def scratch(self, slots: int, sums: int) -> Tensor:
        """Return the buffer, grown if need be."""
        numel = slots * 3 * sums
        if numel > self._scratch.numel():
            self._scratch = self._scratch.new_empty(numel)
        return self._scratch[:numel].view(slots, 3, sums)

    def aligned(self, matrices: npt.NDArray[np.int64]) -> bool:
        """Whether all rows of a table of matrices allow vector loads."""
        addresses = matrices[:, [MatrixField.PARAM, MatrixField.GRAD, MatrixField.EXP_AVG]]
        elements = matrices[:, [MatrixField.START, MatrixField.STOP, MatrixField.COLUMNS]]
        halves = matrices[:, [MatrixField.MODEL_WEIGHT, MatrixField.REMAINDER]]
        return bool(
            (addresses % 16 == 0).all() and (halves % 8 == 0).all() and (elements % 4 == 0).all()
        )

    def run(self, tables: Tables, schedule: Schedule) -> None:
        """Launch what a schedule lists, on the current stream."""
        for kernel, first, stop, _ in schedule.tolist():
            self._launch(Kernel(kernel), first, stop - first, tables)

    def _launch(self, kernel: Kernel, first: int, count: int, tables: Tables) -> None:
        matrices, tile_table, vector_table = tables.matrices, tables.tiles, tables.vectors
        groups, divisors, tiling = tables.groups, tables.divisors, tables.tiling
        tile: dict[str, Any] = {
            "COLUMNS": tiling.columns,
            "STEP": _STEP,
            "ALIGNED": tables.aligned,
            "num_warps": _TILE_WARPS,
        }
        slot: dict[str, Any] = {"ROWS": tiling.slot_rows, **tile}
        strip = {"WIDTH": tiling.slot_sums, "TILES": _STRIP_TILES, "COUNT": tiling.strip}
        match kernel:
            case Kernel.SQUARE_TILES:
                tiles.square_tiles[(count,)](first, matrices, tile_table, tables.scratch, **slot)
            case Kernel.INSTABILITY_TILES:
                tiles.instability_tiles[(count,)](
                    first, matrices, tile_table, divisors, tables.scratch, **slot
                )
            case Kernel.ADD_SQUARE_STRIPS:
                tiles.add_strips[(count, 1)](
                    first, tables.strips, tables.scratch, **strip, SQUARES=True
                )
            case Kernel.ADD_INSTABILITY_STRIPS:
                tiles.add_strips[(count, 3)](
                    first, tables.strips, tables.scratch, **strip, SQUARES=False
                )
            case Kernel.UPDATE_SECOND_MOMENTS:
                factors.update_second_moments[(count,)](
                    first, matrices, tables.factors, groups, divisors, BLOCK=_BLOCK
                )
            case Kernel.UPDATE_INSTABILITIES:
                factors.update_instabilities[(count,)](
                    first, matrices, tables.factors, groups, divisors, BLOCK=_BLOCK
                )
            case Kernel.SUM_SQUARED_UPDATES:
                factors.sum_squared_updates[(count,)](first, matrices, BLOCK=_BLOCK)
            case Kernel.APPLY_TILES:
                tiles.apply_tiles[(count,)](first, matrices, tile_table, groups, divisors, **tile)
            case Kernel.APPLY_SPANS:
                tiles.apply_spans[(count,)](
                    first,
                    matrices,
                    tables.spans,
                    groups,
                    divisors,
                    BLOCKS=tiling.span // INT8_BLOCK,
                    num_warps=_TILE_WARPS,
                )
            case Kernel.SQUARE_VECTORS:
                vectors.square_vectors[(count,)](first, vector_table, BLOCK=_BLOCK)
            case Kernel.UPDATE_VECTOR_MOMENTS:
                vectors.update_vector_moments[(count,)](first, vector_table, groups, BLOCK=_BLOCK)
            case Kernel.APPLY_VECTORS:
                vectors.apply_vectors[(count,)](first, vector_table, groups, BLOCK=_BLOCK)
