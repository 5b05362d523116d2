"""A device that Triton's kernels run on: its cache, and where tables and scratch memory lie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.kernels.triton.tiling import Tiling

# A set of matrices that stay in the cache saves 12 of 32 bytes an element, and takes a launch of
# each of the kernels for matrices, from Python.
_SAVED_BYTES, _SET_LAUNCHES, _LAUNCH_SECONDS = 12, 10, 5e-6


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


class Device:
    """A GPU; under ``TRITON_INTERPRET=1`` the CPU.

    Args:
        device: where the parameters lie.
        replays: whether launches that stay the same become CUDA graphs.

    Attributes:
        replays: as given.
        written_dtypes: of the model weights that kernels write beside the fp32 ones.
        tiling: how matrices are cut.
    """

    written_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    tiling = Tiling(rows=64, columns=256, scratch_tiles=3072, tallest=512)

    def __init__(self, device: torch.device, replays: bool = False) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self.replays = replays
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

    def current(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one, on which Triton launches."""
        return torch.cuda.device(self._device) if self._is_cuda else nullcontext()

    @property
    def is_capturing(self) -> bool:
        """Whether what is launched now goes into somebody's graph."""
        return self._is_cuda and torch.cuda.is_current_stream_capturing()

    def captured(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Return a graph of what a function launches, of which nothing runs yet."""
        graph = torch.cuda.CUDAGraph()
        # A stream of this device: PyTorch's own is of the first that has captured anything. Other
        # threads, such as NCCL's and those that pin memory, may go on.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch()
        return graph

    def upload(self, table: npt.NDArray[Any]) -> Tensor:
        """Copy to the device, from pinned memory: the copy is queued, not waited for."""
        copy = torch.from_numpy(table.copy())
        if not self._is_cuda:
            return copy
        with self.current():  # it is what a stream and pinned memory belong to
            _refuse_capture()
            return copy.pin_memory().to(self._device, non_blocking=True)

    def write(self, place: Tensor, value: float) -> None:
        """Write a number into a table on the device: what launches it carries it there."""
        if self._is_cuda:
            with self.current():
                _refuse_capture()
        place.fill_(value)

    def scratch(self, numel: int) -> Tensor:
        """Return the buffer, grown if need be."""
        if numel > self._scratch.numel():
            self._scratch = self._scratch.new_empty(numel)
        return self._scratch


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "CAME: a tensor or hyperparameter has changed while a CUDA graph is captured: warm up "
            "with the gradients where they will stay, and give the learning rate as a tensor on "
            "the device."
        )
