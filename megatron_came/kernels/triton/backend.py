"""Triton's kernels on a device: what they take, and where their tables lie."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.core.parameter_slice import ParameterSlice, SliceSums
from megatron_came.kernels.backend import unsupported_by_kernels
from megatron_came.kernels.triton.passes import TritonPasses
from megatron_came.kernels.triton.tiling import MOST_OFFSETS, Tiling

# A set of matrices that stay in the cache saves 12 of 32 bytes an element, and takes a launch of
# each of the kernels for matrices, from Python.
_SAVED_BYTES, _SET_LAUNCHES, _LAUNCH_SECONDS = 12, 8, 5e-6


def sets_save_time(cache_elements: int, bytes_per_second: float) -> bool:
    """Whether sets that fill half of a cache save more time than their launches take.

    They do not where memory is fast: an H200 moves what a set saves in the time of two launches.

    Args:
        cache_elements: whose gradient and momentum fill the cache.
        bytes_per_second: between the device and its memory; 0: not known.
    """
    if not bytes_per_second:
        return False
    saved = _SAVED_BYTES * cache_elements / 2 / bytes_per_second
    return saved > _SET_LAUNCHES * _LAUNCH_SECONDS


class TritonBackend:
    """:class:`megatron_came.kernels.backend.Backend` for GPUs.

    Under ``TRITON_INTERPRET=1`` for the CPU.

    Args:
        device: where the parameters lie.
    """

    name = "triton"
    written_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    tiling = Tiling(rows=64, columns=256, scratch_tiles=4096, tallest=512)

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self._scratch = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def cache_elements(self) -> int | None:
        """What the L2 cache holds of gradient and momentum, where sets of matrices save time."""
        if not self._is_cuda:
            return None
        device = torch.cuda.get_device_properties(self._device)
        # Older PyTorch, and some devices, do not report them.
        kilohertz = getattr(device, "memory_clock_rate", 0)
        bits = getattr(device, "memory_bus_width", 0)
        elements = device.L2_cache_size // 8
        return elements if sets_save_time(elements, 2e3 * kilohertz * bits / 8) else None

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Beyond what hinders all kernels, offsets in a tile that do not fit 32 bits."""
        if slice_.shard.local_matrix[2] * self.tiling.most_rows >= MOST_OFFSETS:
            return "with rows of more than 16 million elements"
        return unsupported_by_kernels(slice_)

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> TritonPasses:
        """Make the passes, with tables of these parameters."""
        return TritonPasses(sums, self, is_local)

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one, on which Triton launches."""
        return torch.cuda.device(self._device) if self._is_cuda else nullcontext()

    def upload(self, table: npt.NDArray[Any]) -> Tensor:
        """Copy to the device, from pinned memory: the copy is queued, not waited for."""
        copy = torch.from_numpy(table.copy())
        if not self._is_cuda:
            return copy
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "CAME: a tensor or hyperparameter has changed while a CUDA graph is captured: warm "
                "up with the gradients where they will stay, and give the learning rate as a "
                "tensor on the device."
            )
        return copy.pin_memory().to(self._device, non_blocking=True)

    def scratch(self, tiles: int, sums: int) -> Tensor:
        """Return the buffer, grown if need be."""
        numel = tiles * 3 * sums
        if numel > self._scratch.numel():
            self._scratch = self._scratch.new_empty(numel)
        return self._scratch[:numel].view(tiles, 3, sums)
