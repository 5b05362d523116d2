"""What the kernels of a device are: the tables that they share, and what they can do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_came.core.shard import Shard
from megatron_came.kernels.triton.schedule import Schedule
from megatron_came.kernels.triton.tables import IntTable
from megatron_came.kernels.triton.tiling import Tiling


@dataclass(slots=True)
class Tables:
    """What the kernels read and write, on their device; see ``kernels.triton.tables``.

    Arrays lie in one piece, row by row: kernels are given their addresses.

    Attributes:
        tiling: how the matrices are cut.
        matrices: table of ``MatrixField``.
        vectors: table of ``VectorField``.
        tiles: table of ``TileField``.
        spans: table of ``SpanField``; empty unless momentum is int8.
        strips: table of ``StripField``.
        factors: (matrices, 2): matrix parameter and place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        scratch: (slots, 3, ``tiling.slot_sums``), fp32.
        aligned: whether the matrices allow vector loads.
    """

    tiling: Tiling
    matrices: Any
    vectors: Any
    tiles: Any
    spans: Any
    strips: Any
    factors: Any
    groups: Any
    divisors: Any
    scratch: Any
    aligned: bool = False


class Kernels(Protocol):
    """The fused twins of the passes on one device.

    Attributes:
        tiling: how they like matrices to be cut.
    """

    tiling: Tiling

    @property
    def written_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the model weights that they can write beside the fp32 ones."""
        ...

    @property
    def cache_elements(self) -> int | None:
        """Elements whose fp32 gradient and momentum fill the last cache; None: no limit."""
        ...

    def aligned(self, matrices: IntTable) -> bool:
        """Whether all rows of a table of matrices allow vector loads."""
        ...

    def obstacle(self, param: Tensor, shard: Shard) -> str | None:
        """Return why they cannot, or should not, update this parameter, in words; None if not."""
        ...

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the parameters' device the current one."""
        ...

    def place(self, table: np.ndarray[Any, Any]) -> Any:
        """Copy a table to where the kernels read it, without waiting for the device."""
        ...

    def set_rate(self, tables: Tables, group: int, rate: Tensor) -> None:
        """Write a group's learning rate to its table."""
        ...

    def count_step(self, tables: Tables) -> None:
        """Add one to all groups' steps in their table."""
        ...

    def scratch(self, slots: int, sums: int) -> Any:
        """Return a buffer of (slots, 3, sums); all passes on the device share it."""
        ...

    def run(self, tables: Tables, schedule: Schedule) -> None:
        """Launch what a schedule lists, one after another."""
        ...


def usual_obstacle(param: Tensor, shard: Shard) -> str | None:
    """Return what hinders all kernels: not one piece that an address describes; small matrices."""
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"in tensors of type {type(param).__name__}"
    if not param.is_contiguous():
        return "in tensors that are not contiguous"
    batch, rows, columns = shard.local_matrix
    if batch > 64 and rows * columns < 1024:  # tiles would be mostly empty
        return "with batches of many small matrices, as convolutions are (see flat_convolutions)"
    return None
