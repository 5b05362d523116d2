"""The memory of every rank of a run, from its flags alone."""

import argparse
import copy
from dataclasses import replace
from functools import cached_property

from megatron_came.memory import fsdp
from megatron_came.memory.activations import activation_bytes
from megatron_came.memory.grid import Grid
from megatron_came.memory.meta_model import Chunk, build_stage
from megatron_came.memory.optimizers import Optimizer, has_fsdp
from megatron_came.memory.stages import Stage, full_parameters, lay_out


class Launch:
    """A run that has not been started.

    Args:
        args: Megatron's arguments, validated, with ``padded_vocab_size``; left as they are.

    Raises:
        UnsupportedError: from the properties, a model that cannot be predicted.
        ValueError: parallel sizes that do not fit into each other.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.grid = Grid.of(args)
        self._stages: dict[int, list[Stage]] = {}
        self._lay_out = fsdp.lay_out if has_fsdp(args) else lay_out

    @cached_property
    def chunks(self) -> list[list[Chunk]]:
        """The model, by pipeline stage."""
        return [build_stage(self.args, self.grid, s) for s in range(self.grid.pipeline)]

    @property
    def parameters(self) -> int:
        """Number of elements of the whole model's weights."""
        return sum(full_parameters(chunk, self.grid) for chunks in self.chunks for chunk in chunks)

    @property
    def has_global_batch(self) -> bool:
        """Whether the global batch size was given."""
        # Megatron's own note of it, since validation fills what was not given.
        return bool(getattr(self.args, "_is_global_batch_size_explicitly_specified", True))

    @cached_property
    def stages(self) -> list[Stage]:
        """The pipeline stages of the launch as it is, each with its fullest rank."""
        return self.stages_at(self.grid.data, self.args.micro_batch_size)

    def fullest(self, optimizer: Optimizer) -> Stage:
        """The stage whose fullest rank holds most."""
        return max(self.stages, key=lambda stage: stage.total(optimizer))

    def peak(self, optimizer: Optimizer) -> int:
        """Bytes of the fullest rank of the launch as it is, in a step or at a checkpoint."""
        return max(stage.peak(optimizer) for stage in self.stages)

    def stages_at(self, data: int, micro_batch: int) -> list[Stage]:
        """The pipeline stages at another data-parallel size and micro-batch size.

        A global batch size that was not given follows from both.

        Raises:
            ValueError: a data-parallel size that the layout cannot have.
        """
        grid = self.grid.with_data(data)
        args = copy.copy(self.args)
        args.world_size, args.data_parallel_size = grid.world, data
        args.micro_batch_size = micro_batch
        if not self.has_global_batch:
            args.global_batch_size = data * micro_batch
        if data not in self._stages:  # buffers do not depend on the micro-batch
            self._stages[data] = [
                self._lay_out(args, grid, number, chunks).of_fullest_ranks(grid)
                for number, chunks in enumerate(self.chunks)
            ]
        return [
            replace(stage, activations=activation_bytes(args, grid, stage.number, chunks))
            for stage, chunks in zip(self._stages[data], self.chunks, strict=True)
        ]

    def rank(self, number: int, shards: tuple[int, int]) -> Stage:
        """One rank's stage, seen from that rank, which holds these dense and experts' shards."""
        chunks = build_stage(self.args, self.grid, number)
        stage = self._lay_out(self.args, self.grid, number, chunks)
        activations = activation_bytes(self.args, self.grid, number, chunks)
        return replace(stage, shards=shards, whole_shards=shards, activations=activations)
