"""The passes of a step through kernels: which are launched, in which order, over which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_came.core.hyperparameters import TABLE
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums, StepInputs
from megatron_came.core.state import MATRIX_FACTORS, VECTOR_FACTORS
from megatron_came.kernels.triton.addresses import Addresses, Seen, is_int8_momentum
from megatron_came.kernels.triton.schedule import Schedule, Schedules
from megatron_came.kernels.triton.tables import (
    GroupField,
    IntTable,
    MatrixField,
    SpanField,
    VectorField,
    matrix_row,
    vector_row,
)
from megatron_came.kernels.triton.tiling import Tiling, cache_blocks, cut, grown, spans


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
    """The kernels of one device, which read tables.

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


class FusedPasses:
    """:class:`megatron_came.kernels.backend.Passes` through kernels that read tables.

    Args:
        sums: of the parameters that may take part in a step.
        kernels: of their device.
        is_local: whether no sum goes over ranks, so that matrices that together fit the cache can
            go through all passes before the next ones.
    """

    def __init__(
        self, sums: Mapping[ParameterSlice, SliceSums], kernels: Kernels, is_local: bool
    ) -> None:
        self._kernels, self._sums = kernels, sums
        self._block_elements = None
        if is_local and kernels.cache_elements is not None:
            # The fuller a cache, the more of it is lost.
            self._block_elements = kernels.cache_elements // 2
        self._members: list[ParameterSlice] = []
        self._steps: list[int] | None = None  # of all groups
        self._scales = {slice_: _scales(slice_) for slice_ in sums}

    def begin(self, inputs: Mapping[ParameterSlice, StepInputs]) -> FusedStep:
        """Look where this step's tensors lie, and make new tables where other parameters come."""
        if not self._members or list(inputs) != self._members:
            self._build(inputs)
        matrices, vectors = self._matrices.refresh(inputs), self._vectors.refresh(inputs)
        if matrices.table is not self._tables.matrices:
            self._tables.aligned = self._kernels.aligned(self._matrix_table)
            self._tables.matrices = matrices.table
        self._tables.vectors = vectors.table
        self._refresh_groups(inputs, rounds=matrices.rounds or vectors.rounds)
        # Others share the scratch buffer, which may have grown since.
        self._tables.scratch = self._kernels.scratch(self._slots, self._tables.tiling.slot_sums)
        return FusedStep(self._kernels, self._tables, self._schedules, (matrices, vectors), inputs)

    def _build(self, inputs: Mapping[ParameterSlice, StepInputs]) -> None:
        """Make the tables of these parameters."""
        self._members = []  # until all is made
        is_int8 = any(is_int8_momentum(each.state) for each in inputs.values())
        matrices = [slice_ for slice_ in inputs if not slice_.shard.is_vector]
        vectors = [slice_ for slice_ in inputs if slice_.shard.is_vector]
        self._groups = list({slice_.group: slice_ for slice_ in inputs}.values())
        group_of = {slice_.group: index for index, slice_ in enumerate(self._groups)}
        sums = [self._sums[slice_] for slice_ in matrices]
        batches = [slice_.shard.local_matrix[0] for slice_ in matrices]
        firsts = np.cumsum([0, *batches])
        self._matrix_table = _stack(
            MatrixField,
            [
                matrix_row(slice_, one, group_of[slice_.group], self._scales[slice_], int(first))
                for slice_, one, first in zip(matrices, sums, firsts, strict=False)
            ],
        )
        vector_table = _stack(
            VectorField,
            [vector_row(slice_, self._sums[slice_], group_of[slice_.group]) for slice_ in vectors],
        )
        factors = [(i, matrix) for i, batch in enumerate(batches) for matrix in range(batch)]
        shards = [slice_.shard for slice_ in matrices]
        tiling = grown(self._kernels.tiling, shards)
        together = [*cache_blocks([shard.numel for shard in shards], self._block_elements)]
        tiles, strips, blocks, self._slots = cut(shards, sums, tiling, together)
        span_table = spans(shards if is_int8 else [], tiling.span)
        first_spans = np.searchsorted(
            span_table[:, SpanField.PARAM], np.arange(len(shards) + 1)
        ).tolist()
        self._schedules = Schedules.of(blocks, firsts.tolist(), first_spans, len(vectors), is_int8)
        place = self._kernels.place
        of = self._kernels, is_int8
        self._matrices = Addresses(matrices, self._matrix_table, MATRIX_FACTORS, *of)
        self._vectors = Addresses(vectors, vector_table, VECTOR_FACTORS, *of)
        self._group_rows: list[tuple[float, ...]] = []
        self._steps = None
        self._tables = Tables(
            tiling=tiling,
            matrices=None,
            vectors=None,
            tiles=place(tiles),
            spans=place(span_table),
            strips=place(strips),
            factors=place(np.array(factors, np.int64).reshape(-1, 2)),
            groups=None,
            divisors=place(np.zeros((int(firsts[-1]), 2), np.float32)),
            scratch=None,
        )
        self._members = list(inputs)

    def _refresh_groups(self, inputs: Mapping[ParameterSlice, StepInputs], *, rounds: bool) -> None:
        """Write anew learning rates and other hyperparameters, if any has changed."""
        groups = [inputs[slice_] for slice_ in self._groups]
        rows = [_group_row(group) for group in groups]
        steps = [group.step for group in groups] if rounds else []
        # After a step that has failed they are the last ones: what was counted is in doubt.
        last, self._steps = self._steps, steps
        is_next = last is not None and steps == [step + 1 for step in last]
        if rows != self._group_rows or (rounds and not is_next):
            self._group_rows = []  # until they are placed
            table = np.array(rows, np.float64).reshape(-1, len(GroupField))
            table[:, GroupField.STEP] = steps or 0
            self._tables.groups = self._kernels.place(table)
            self._group_rows = rows
        elif rounds:
            self._kernels.count_step(self._tables)
        for index, group in enumerate(groups):
            if isinstance(group.lr, Tensor):
                self._kernels.set_rate(self._tables, index, group.lr)


class FusedStep:
    """:class:`megatron_came.kernels.backend.Step` through kernels that read tables."""

    def __init__(
        self,
        kernels: Kernels,
        tables: Tables,
        schedules: Schedules,
        seen: Sequence[Seen],
        inputs: Mapping[ParameterSlice, StepInputs],
    ) -> None:
        self._kernels, self._tables, self._schedules = kernels, tables, schedules
        self._seen, self._inputs = seen, inputs

    def add_square_sums(self) -> None:
        """Pass 1."""
        self._launch(self._schedules.squares)

    def add_instability_sums(self) -> None:
        """With the sums of pass 1 complete: second moments and pass 2."""
        self._launch(self._schedules.instability)

    def apply(self) -> None:
        """With the sums of pass 2 complete: instabilities and pass 3."""
        self._launch(self._schedules.apply)
        self._copy_to_model()

    def run(self) -> None:
        """All passes, where no sum goes over ranks."""
        self._launch(self._schedules.step)
        self._copy_to_model()

    def _launch(self, schedule: Schedule) -> None:
        with self._kernels.on_device():
            self._kernels.run(self._tables, schedule)

    def _copy_to_model(self) -> None:
        """Rewrite what the kernels have not of the model's weights."""
        for seen in self._seen:
            for slice_ in seen.copied:
                slice_.copy_to_model(self._inputs[slice_].model_weight)


def _group_row(group: StepInputs) -> tuple[float, ...]:
    """Return a row of ``GroupField``, without the step."""
    row = [0.0] * len(GroupField)
    # A rate on the device is copied there: the host need not wait for it, and a CUDA graph reads
    # it anew.
    row[GroupField.LR] = -1.0 if isinstance(group.lr, Tensor) else float(group.lr)
    row[GroupField.WEIGHT_DECAY] = group.weight_decay
    for each in TABLE:
        row[GroupField[each.name.upper()]] = getattr(group.hyper, each.name)
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


def _stack(fields: type[MatrixField] | type[VectorField], rows: list[IntTable]) -> IntTable:
    return np.stack(rows) if rows else np.zeros((0, len(fields)), np.int64)
