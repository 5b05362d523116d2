"""Launches that are replayed as a CUDA graph instead of launched from Python.

A graph holds kernels, grids and the addresses of tables. All that changes from step to step stands
in the tables, which kernels read as they run: where tensors lie, rates, decays, the number of
steps. So a graph does what launching would for as long as these addresses stay the same.

The reductions between the passes are not captured: NCCL wants of each collective that all ranks
have captured it or none, and a rank does not know what has moved on others. Nor is what is written
into the tables.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_came.kernels.triton.device import Device

# How often the same is launched before it is captured: by then every kernel is compiled and loaded.
WARM_UP = 3


class Replay:
    """Launches that mostly are the same as the last time.

    Args:
        device: on which.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._launches: object = None
        self._seen, self._warm_up = 0, WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, launches: object, launch: Callable[[], None]) -> None:
        """Launch from Python, or the same by a graph.

        Args:
            launches: equal to the last ones only if all kernels, grids and arguments are the same.
            launch: launches them, on the current stream of the current device.
        """
        if launches != self._launches:
            if self._graph is not None:  # capturing often costs more than it saves
                self._warm_up *= 2
            self._launches, self._seen, self._graph = launches, 0, None
        if self._seen < self._warm_up or self._device.is_capturing:  # by whoever calls the step
            self._seen += 1
            launch()
            return
        if self._graph is None:
            self._graph = self._device.captured(launch)
        self._graph.replay()
