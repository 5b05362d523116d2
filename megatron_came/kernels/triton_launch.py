"""The Triton kernels and their launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_came.kernels import triton_kernels as kernels
from megatron_came.kernels.fused import Tables, is_batch_of_small, is_ordinary
from megatron_came.kernels.tables import GroupField, MatrixField, Segment, Tiling
from megatron_came.layout import Shard
from megatron_came.maths.int8 import BLOCK as INT8_BLOCK

_STEP = 8  # rows of a tile that a program reads at once
_TILE_WARPS = 8
_BLOCK = 1024  # elements of a factor or vector that a program reads at once
_STRIP_TILES = 16


class TritonKernels:
    """:class:`megatron_came.kernels.fused.Kernels` for GPUs.

    Under ``TRITON_INTERPRET=1`` for the CPU.

    Args:
        device: where the parameters lie.
    """

    written_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    tiling = Tiling(rows=64, columns=256, slots=4096)

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        width = self.tiling.rows + self.tiling.columns
        self._scratch = torch.empty(0, 3, width, dtype=torch.float32, device=device)

    @property
    def chunk_elements(self) -> int | None:
        """What half of the L2 cache holds of gradient and momentum."""
        if not self._is_cuda:
            return None
        return int(torch.cuda.get_device_properties(self._device).L2_cache_size) // 2 // 8

    def bears(self, param: Tensor, shard: Shard) -> bool:
        """Tensors in one piece, with places in a tile that fit 32 bits."""
        narrow = shard.local_matrix[2] < 2**24
        return is_ordinary(param) and narrow and not is_batch_of_small(shard)

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
                "CAME: a tensor, hyperparameter or random key has changed while a CUDA graph is "
                "captured: warm up with the gradients where they will stay, give the learning "
                "rate as a tensor on the device, and keep the momentum in fp32."
            )
        return host.pin_memory().to(self._device, non_blocking=True)

    def set_rate(self, tables: Tables, group: int, rate: Tensor) -> None:
        """Write a group's learning rate to its table, on the device."""
        tables.groups[group, GroupField.LR].copy_(rate)

    def scratch(self, slots: int) -> Tensor:
        """Return the buffer, grown if need be."""
        if slots > len(self._scratch):
            self._scratch = self._scratch.new_empty(slots, *self._scratch.shape[1:])
        return self._scratch

    def aligned(self, matrices: npt.NDArray[np.int64]) -> bool:
        """Whether all rows of a table of matrices allow vector loads."""
        addresses = matrices[:, [MatrixField.PARAM, MatrixField.GRAD, MatrixField.EXP_AVG]]
        elements = matrices[:, [MatrixField.START, MatrixField.STOP, MatrixField.COLUMNS]]
        halves = matrices[:, [MatrixField.MODEL_WEIGHT, MatrixField.REMAINDER]]
        return bool(
            (addresses % 16 == 0).all() and (halves % 8 == 0).all() and (elements % 4 == 0).all()
        )

    @property
    def _tile_shape(self) -> dict[str, int]:
        return {"ROWS": self.tiling.rows, "COLUMNS": self.tiling.columns, "STEP": _STEP}

    def square_tiles(self, tables: Tables, segment: Segment) -> None:
        """See ``triton_kernels.square_tiles``; likewise below."""
        kernels.square_tiles[(segment.tiles.stop - segment.tiles.start,)](
            tables.matrices,
            tables.tiles,
            tables.scratch,
            segment.tiles.start,
            **self._tile_shape,
            ALIGNED=tables.aligned,
            num_warps=_TILE_WARPS,
        )

    def instability_tiles(self, tables: Tables, segment: Segment) -> None:  # noqa: D102
        kernels.instability_tiles[(segment.tiles.stop - segment.tiles.start,)](
            tables.matrices,
            tables.tiles,
            tables.divisors,
            tables.scratch,
            segment.tiles.start,
            **self._tile_shape,
            ALIGNED=tables.aligned,
            num_warps=_TILE_WARPS,
        )

    def add_square_strips(self, tables: Tables, segment: Segment) -> None:  # noqa: D102
        self._add_strips(tables, segment, kinds=1)

    def add_instability_strips(self, tables: Tables, segment: Segment) -> None:  # noqa: D102
        self._add_strips(tables, segment, kinds=3)

    def _add_strips(self, tables: Tables, segment: Segment, kinds: int) -> None:
        kernels.add_strips[(segment.strips.stop - segment.strips.start, kinds)](
            tables.strips,
            tables.scratch,
            segment.strips.start,
            WIDTH=self.tiling.rows + self.tiling.columns,
            TILES=_STRIP_TILES,
            COUNT=max(self.tiling.rows, self.tiling.columns),
            SQUARES=kinds == 1,
        )

    def update_second_moments(self, tables: Tables) -> None:  # noqa: D102
        kernels.update_second_moments[(len(tables.factors),)](
            tables.matrices, tables.factors, tables.groups, tables.divisors, BLOCK=_BLOCK
        )

    def update_instabilities(self, tables: Tables) -> None:  # noqa: D102
        kernels.update_instabilities[(len(tables.factors),)](
            tables.matrices, tables.factors, tables.groups, tables.divisors, BLOCK=_BLOCK
        )

    def total_updates(self, tables: Tables) -> None:  # noqa: D102
        kernels.total_updates[(len(tables.matrices),)](tables.matrices, BLOCK=_BLOCK)

    def apply_tiles(self, tables: Tables) -> None:  # noqa: D102
        if not len(tables.tiles):
            return
        kernels.apply_tiles[(len(tables.tiles),)](
            tables.matrices,
            tables.tiles,
            tables.groups,
            tables.divisors,
            **self._tile_shape,
            ALIGNED=tables.aligned,
            num_warps=_TILE_WARPS,
        )

    def apply_spans(self, tables: Tables) -> None:  # noqa: D102
        if not len(tables.spans):
            return
        kernels.apply_spans[(len(tables.spans),)](
            tables.matrices,
            tables.spans,
            tables.groups,
            tables.divisors,
            BLOCKS=self.tiling.span // INT8_BLOCK,
            num_warps=_TILE_WARPS,
        )

    def square_vectors(self, tables: Tables) -> None:  # noqa: D102
        kernels.square_vectors[(len(tables.vectors),)](tables.vectors, BLOCK=_BLOCK)

    def update_vectors(self, tables: Tables) -> None:  # noqa: D102
        kernels.update_vectors[(len(tables.vectors),)](tables.vectors, tables.groups, BLOCK=_BLOCK)

    def apply_vectors(self, tables: Tables) -> None:  # noqa: D102
        kernels.apply_vectors[(len(tables.vectors),)](tables.vectors, tables.groups, BLOCK=_BLOCK)
