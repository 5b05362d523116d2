"""Triton's backend: which parameters it takes."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_came.core.parameter_slice import ParameterSlice, SliceSums
from megatron_came.kernels.backend import unsupported_by_kernels
from megatron_came.kernels.triton.device import Device
from megatron_came.kernels.triton.passes import TritonPasses
from megatron_came.kernels.triton.tiling import MOST_OFFSETS


class TritonBackend(Device):
    """:class:`megatron_came.kernels.backend.Backend` for GPUs."""

    name = "triton"

    def unsupported(self, slice_: ParameterSlice) -> str | None:
        """Beyond what hinders all kernels, offsets in a tile that do not fit 32 bits."""
        if slice_.shard.local_matrix[2] * self.tiling.rows >= MOST_OFFSETS:
            return "with rows of more than 16 million elements"
        return unsupported_by_kernels(slice_)

    def passes(self, sums: Mapping[ParameterSlice, SliceSums], *, is_local: bool) -> TritonPasses:
        """Make the passes, with tables of these parameters."""
        return TritonPasses(sums, self, is_local)
