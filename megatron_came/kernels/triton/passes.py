"""Triton's backend: the passes of a step, their tables, and what is launched over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from megatron_came.core.hyperparameters import TABLE, GroupSettings, Hyperparameters
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.state import MATRIX_FACTORS, VECTOR_FACTORS
from megatron_came.kernels.backend import unsupported_by_kernels
from megatron_came.kernels.state_checks import is_int8_momentum
from megatron_came.kernels.triton.addresses import Addresses, kind_of
from megatron_came.kernels.triton.device import Device
from megatron_came.kernels.triton.graphs import Replay
from megatron_came.kernels.triton.launch import BLOCK, Owners, Schedules, Tables, run
from megatron_came.kernels.triton.tables import GroupField, ParamField, param_row
from megatron_came.kernels.triton.tiling import (
    MOST_OFFSETS,
    cut,
    cut_blocks,
    cut_factors,
    in_cache,
    with_higher_tiles,
)


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


class TritonPasses:
    """:class:`megatron_came.kernels.backend.Passes` on a GPU.

    Args:
        sums: of the parameters that may take part in a step.
        device: on which they lie.
        is_local: whether no sum goes over ranks, so that matrices that together fit the cache can
            go through all passes before the next ones.

    Attributes:
        replays: of each schedule.
    """

    def __init__(
        self, sums: Mapping[ParameterSlice, SliceSums], device: Device, is_local: bool
    ) -> None:
        self._device, self._sums = device, sums
        self._cache_elements = None
        if is_local and device.cache_elements is not None:
            # The fuller a cache, the more of it is lost.
            self._cache_elements = device.cache_elements // 2
        self._members: list[ParameterSlice] = []
        self._steps: list[int] | None = None  # of all groups
        self._scales = {slice_: _scales(slice_) for slice_ in sums}
        self.replays = {name: Replay(device) for name in Schedules._fields}

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> TritonStep:
        """Look where this step's tensors lie, and make new tables where other parameters come."""
        if not self._members or list(inputs) != self._members:
            self._build(inputs)
        matrices, vectors = self._matrices.refresh(inputs), self._vectors.refresh(inputs)
        if matrices.table is not self._tables.matrices:
            owners = self._owners._replace(kinds=self._matrices.kinds)
            self._schedules = Schedules.of(self._sets, owners, self._vector_count)
            self._tables.matrices = matrices.table
        self._tables.vectors = vectors.table
        self._rounds = matrices.rounds or vectors.rounds
        settings = {slice_.group: inputs[slice_].settings for slice_ in self._groups}
        self.refresh_settings(settings)
        weights = [
            (slice_, inputs[slice_].model_weight)
            for seen in (matrices, vectors)
            for slice_ in seen.copied
        ]
        grads = [*matrices.grads, *vectors.grads]
        return TritonStep(self, self._device, self._tables, self._schedules, weights, grads)

    def _build(self, inputs: Mapping[ParameterSlice, StepInputs]) -> None:
        """Make the tables of these parameters."""
        self._members = []  # until all is made
        is_int8 = any(is_int8_momentum(each.state) for each in inputs.values())
        # Those of a kind beside one another, so that launches are few.
        matrices = sorted(
            (slice_ for slice_ in inputs if not slice_.shard.is_vector),
            key=lambda slice_: kind_of(slice_, inputs[slice_], self._device.tiling.columns),
        )
        vectors = [slice_ for slice_ in inputs if slice_.shard.is_vector]
        self._groups = list({slice_.group: slice_ for slice_ in inputs}.values())
        group_of = {slice_.group: index for index, slice_ in enumerate(self._groups)}
        sums = [self._sums[slice_] for slice_ in matrices]
        firsts = np.cumsum([0, *(slice_.shard.local_matrix[0] for slice_ in matrices)])
        matrix_table, vector_table = (
            np.array(
                [param_row(o, self._sums[o], group_of[o.group], self._scales[o]) for o in some],
                np.int64,
            ).reshape(-1, len(ParamField))
            for some in (matrices, vectors)
        )
        matrix_table[:, ParamField.FIRST_MATRIX] = firsts[:-1]
        shards = [slice_.shard for slice_ in matrices]
        tiling = with_higher_tiles(self._device.tiling, shards)
        together = [*in_cache([shard.numel for shard in shards], self._cache_elements)]
        tiles, additions, self._sets, count = cut(shards, sums, tiling, together)
        self._scratch_floats = count * tiling.tile_floats
        blocks = cut_blocks(shards if is_int8 else [], tiling)
        factors = cut_factors(shards, BLOCK)
        self._owners = Owners(*(table[:, 0].tolist() for table in (tiles, blocks, factors)))
        self._vector_count = len(vectors)
        upload = self._device.upload
        of = self._device, is_int8
        self._matrices = Addresses(matrices, matrix_table, MATRIX_FACTORS, *of)
        self._vectors = Addresses(vectors, vector_table, VECTOR_FACTORS, *of)
        self._group_rows: list[tuple[float, ...]] = []
        self._steps = None
        self._tables = Tables(
            tiling=tiling,
            matrices=None,
            vectors=None,
            tiles=upload(tiles),
            blocks=upload(blocks),
            additions=upload(additions),
            factors=upload(factors),
            groups=None,
            divisors=upload(np.zeros((int(firsts[-1]), 2), np.float32)),
            partials=upload(np.zeros((len(factors), 2))),
            scratch=None,
        )
        self._members = list(inputs)

    def refresh_settings(
        self, settings: Mapping[int, GroupSettings] | Sequence[GroupSettings]
    ) -> None:
        """Write anew learning rates and other hyperparameters, if any has changed.

        Args:
            settings: by number of the parameter group.
        """
        # Others share the scratch buffer, which may have grown since.
        self._tables.scratch = self._device.scratch(self._scratch_floats)
        rounds = self._rounds
        groups = [settings[slice_.group] for slice_ in self._groups]
        rows = [_group_row(group) for group in groups]
        steps = [group.step for group in groups] if rounds else []
        # After a step that has failed they are the last ones: what was counted is in doubt.
        last, self._steps = self._steps, steps
        is_next = last is not None and steps == [step + 1 for step in last]
        before, self._group_rows = self._group_rows, []  # until all is written
        if not before or (rounds and not is_next):
            table = np.array(rows, np.float64).reshape(-1, len(GroupField))
            table[:, GroupField.STEP] = steps or 0
            self._tables.groups = self._device.upload(table)
        else:
            for index, pair in enumerate(zip(before, rows, strict=True)):
                for column, (old, new) in enumerate(zip(*pair, strict=True)):
                    if old != new:
                        self._device.write(self._tables.groups[index, column], new)
            if rounds:
                self._count_step()
        self._group_rows = rows
        for index, group in enumerate(groups):
            if isinstance(group.lr, Tensor):
                self._tables.groups[index, GroupField.LR].copy_(group.lr)

    def _count_step(self) -> None:
        """Add one to all groups' steps, on the device."""
        self._tables.groups[:, GroupField.STEP].add_(1)


class TritonStep:
    """:class:`megatron_came.kernels.backend.Step` on a GPU."""

    def __init__(
        self,
        passes: TritonPasses,
        device: Device,
        tables: Tables,
        schedules: Schedules,
        weights: Sequence[tuple[ParameterSlice, Tensor | None]],
        grads: Sequence[Tensor],
    ) -> None:
        self._passes, self._device = passes, device
        self._tables, self._schedules = tables, schedules
        self._weights, self._grads = weights, grads

    @property
    def lasts(self) -> bool:
        """Copies of gradients are of one step."""
        return not self._grads

    def again(self, settings: Sequence[GroupSettings]) -> None:
        """Take up what the parameter groups say now."""
        self._passes.refresh_settings(settings)

    def take(self, *passes: int) -> None:
        """Launch what is scheduled for one of the passes, or for all of them together."""
        name = "step" if len(passes) > 1 else Schedules._fields[passes[0] - 1]
        schedule = getattr(self._schedules, name)
        launch = partial(run, self._tables, schedule)
        with self._device.current():
            if schedule and self._device.replays:
                key = self._tables.tiling, self._tables.addresses, schedule
                self._passes.replays[name].run(key, launch)
            else:
                launch()
        for slice_, weight in self._weights if 3 in passes else ():  # which kernels cannot write
            slice_.copy_to_model(weight)


def _group_row(group: GroupSettings) -> tuple[float, ...]:
    """Return a row of ``GroupField``, without the step."""
    row = [*_columns(group.hyper)]
    # A rate on the device is copied there: nobody waits for it, and a CUDA graph reads it anew.
    row[GroupField.LR] = -1.0 if isinstance(group.lr, Tensor) else float(group.lr)
    row[GroupField.WEIGHT_DECAY] = group.weight_decay
    return tuple(row)


@lru_cache
def _columns(hyper: Hyperparameters) -> tuple[float, ...]:
    """Return a row of ``GroupField`` with hyperparameters alone."""
    row = [0.0] * len(GroupField)
    for each in TABLE:
        row[GroupField[each.name.upper()]] = float(getattr(hyper, each.name))
    return tuple(row)


def _scales(slice_: ParameterSlice) -> tuple[Tensor, ...]:
    """Make room for row and column scale, and row and column confidence, of a matrix parameter."""
    if slice_.shard.is_vector:
        return ()
    batch, rows, columns = slice_.shard.local_matrix
    return tuple(
        torch.empty(batch, count, dtype=torch.float32, device=slice_.param.device)
        for count in (rows, columns, rows, columns)
    )
