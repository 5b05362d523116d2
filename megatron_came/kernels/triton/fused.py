"""The passes of a step through kernels: which are launched, in which order, over which rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.state import MATRIX_FACTORS, VECTOR_FACTORS
from megatron_came.kernels.backend import Kernels, Tables
from megatron_came.kernels.triton.addresses import Addresses, is_int8_momentum
from megatron_came.kernels.triton.schedule import Schedule, Schedules
from megatron_came.kernels.triton.tables import (
    GroupField,
    IntTable,
    MatrixField,
    SpanField,
    Sums,
    VectorField,
    matrix_row,
    vector_row,
)
from megatron_came.kernels.triton.tiling import cache_blocks, cut, grown, spans


class FusedPasses:
    """The passes over some parameters through kernels.

    Args:
        works: the parameters that may take part in a step.
        kernels: of their device.
        is_local: whether no sum goes over ranks, so that matrices that together fit the cache can
            go through all passes before the next ones.
    """

    def __init__(
        self, works: Sequence[ParameterSlice], kernels: Kernels, is_local: bool = False
    ) -> None:
        self._kernels = kernels
        self._block_elements = None
        if is_local and kernels.cache_elements is not None:
            # The fuller a cache, the more of it is lost.
            self._block_elements = kernels.cache_elements // 2
        self._members: list[ParameterSlice] = []
        self._steps: list[int] | None = None  # of all groups
        self._scales = [_scales(work) for work in works]
        self._scales_of = dict(zip(works, self._scales, strict=True))

    def begin(self, active: Sequence[ParameterSlice]) -> None:
        """Start a step of these parameters, all of which have begun.

        Raises:
            ValueError: state that does not fit its parameter.
        """
        if not self._members or active != self._members:
            self._build(list(active))
        self._refresh_addresses()
        self._refresh_groups()
        # Others share the scratch buffer, which may have grown since.
        self._tables.scratch = self._kernels.scratch(self._slots, self._tables.tiling.slot_sums)

    def add_square_sums(self) -> None:
        """Pass 1."""
        self._run(self._schedules.squares)

    def add_instability_sums(self) -> None:
        """With the sums of pass 1 complete: second moments and pass 2."""
        self._run(self._schedules.instability)

    def apply(self) -> None:
        """With the sums of pass 2 complete: instabilities and pass 3, but of copies."""
        self._run(self._schedules.apply)

    def apply_copies(self) -> None:
        """The same of copies, with second moments anew from the sums that all copies share."""
        self._run(self._schedules.apply_copies)

    def step(self) -> None:
        """All passes, where no sum goes over ranks."""
        self._run(self._schedules.step)

    def end(self) -> None:
        """Rewrite what the kernels have not of the model's weights, and let go of the gradients."""
        for addresses in (self._matrices, self._vectors):
            for work in addresses.copied:
                work.copy_to_model()
            addresses.release()

    def _run(self, schedule: Schedule) -> None:
        with self._kernels.on_device():
            self._kernels.run(self._tables, schedule)

    def _build(self, members: list[ParameterSlice]) -> None:
        """Make the tables of these parameters."""
        self._members = []  # until all is made
        is_int8 = any(map(is_int8_momentum, members))
        matrices = [work for work in members if not work.shard.is_vector]
        matrices.sort(key=lambda work: work.copies_group is not None)  # copies last
        vectors = [work for work in members if work.shard.is_vector]
        self._groups = list({id(work.group): work for work in members}.values())
        group_of = {id(work.group): index for index, work in enumerate(self._groups)}
        sums = [Sums(work.square_sums, work.total, work.residual_sums) for work in matrices]
        batches = [work.shard.local_matrix[0] for work in matrices]
        firsts = np.cumsum([0, *batches])
        self._matrix_table = _stack(
            MatrixField,
            [
                matrix_row(
                    work.shard,
                    one,
                    group_of[id(work.group)],
                    work.key,
                    self._scales_of[work],
                    int(first),
                )
                for work, one, first in zip(matrices, sums, firsts, strict=False)
            ],
        )
        vector_table = _stack(
            VectorField,
            [
                vector_row(
                    work.shard,
                    Sums(work.square_sums, work.total),
                    group_of[id(work.group)],
                    work.key,
                )
                for work in vectors
            ],
        )
        factors = [(i, matrix) for i, batch in enumerate(batches) for matrix in range(batch)]
        shards = [work.shard for work in matrices]
        tiling = grown(self._kernels.tiling, shards)
        own = sum(work.copies_group is None for work in matrices)
        together = [*cache_blocks([shard.numel for shard in shards[:own]], self._block_elements)]
        copies = [range(own, len(shards))] if own < len(shards) else []
        tiles, strips, blocks, self._slots = cut(shards, sums, tiling, together + copies)
        span_table = spans(shards if is_int8 else [], tiling.span)
        first_spans = np.searchsorted(
            span_table[:, SpanField.PARAM], np.arange(len(shards) + 1)
        ).tolist()
        self._schedules = Schedules.of(
            blocks, len(together), firsts.tolist(), first_spans, len(vectors), is_int8
        )
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
        self._members = members

    def _refresh_addresses(self) -> None:
        """Write anew where tensors lie, if the host has moved any."""
        matrices = self._matrices.refresh()
        if matrices is not self._tables.matrices:
            self._tables.aligned = self._kernels.aligned(self._matrix_table)
            self._tables.matrices = matrices
        self._tables.vectors = self._vectors.refresh()

    def _refresh_groups(self) -> None:
        """Write anew learning rates and other hyperparameters, if any has changed."""
        rows = []
        for work in self._groups:
            hyper, group = work.hyper, work.group
            row = [0.0] * len(GroupField)
            # A rate on the device is copied there: the host need not wait for it, and a CUDA graph
            # reads it anew.
            rate = group["lr"]
            row[GroupField.LR] = math.nan if isinstance(rate, Tensor) else float(rate)
            row[GroupField.WEIGHT_DECAY] = float(group["weight_decay"])
            row[GroupField.BETA1], row[GroupField.BETA2], row[GroupField.BETA3] = hyper.betas
            row[GroupField.EPS1], row[GroupField.EPS2] = hyper.eps
            row[GroupField.CLIP_THRESHOLD] = hyper.clip_threshold
            rows.append(tuple(row))
        rounds = self._matrices.rounds or self._vectors.rounds
        steps = [work.group.get("step", 0) for work in self._groups] if rounds else []
        # After a step that has failed they are the last ones: what was counted is in doubt.
        last, self._steps = self._steps, steps
        is_next = last is not None and steps == [step + 1 for step in last]
        has_changed = repr(rows) != repr(self._group_rows)  # as text: NaN is not NaN
        if has_changed or (rounds and not is_next):
            self._group_rows = []  # until they are placed
            table = np.array(rows, np.float64).reshape(-1, len(GroupField))
            table[:, GroupField.STEP] = steps or 0
            self._tables.groups = self._kernels.place(table)
            self._group_rows = rows
        elif rounds:
            self._kernels.count_step(self._tables)
        for index, work in enumerate(self._groups):
            if isinstance(work.group["lr"], Tensor):
                self._kernels.set_rate(self._tables, index, work.group["lr"])


def _scales(work: ParameterSlice) -> tuple[Tensor, ...]:
    """Make room for row and column scale, and row and column confidence, of a matrix parameter."""
    if work.shard.is_vector:
        return ()
    batch, rows, columns = work.shard.local_matrix
    return tuple(
        torch.empty(batch, count, dtype=torch.float32, device=work.param.device)
        for count in (rows, columns, rows, columns)
    )


def _stack(fields: type[MatrixField] | type[VectorField], rows: list[IntTable]) -> IntTable:
    return np.stack(rows) if rows else np.zeros((0, len(fields)), np.int64)
