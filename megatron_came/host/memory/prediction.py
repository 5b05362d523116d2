"""The memory of every rank of a run, from its flags alone."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import cached_property

from megatron_came.host.memory.activations import activation_bytes
from megatron_came.host.memory.buffers import Layout, fullest_shard, lay_out
from megatron_came.host.memory.components import Components
from megatron_came.host.memory.grid import Grid
from megatron_came.host.memory.meta_model import Chunk, build_stage
from megatron_came.host.memory.precisions import SCALE_BYTES, Optimizer


def components(layout: Layout, optimizer: Optimizer, shards: tuple[int, int]) -> Components:
    """What a rank of a stage keeps from step to step.

    Args:
        layout: of the stage.
        optimizer: the one that trains it.
        shards: which shards of dense and of experts' parameters the rank holds.
    """
    main_weights = momentum = second_moment = copies = 0
    for part in layout.slices:
        shard = shards[part.of_experts]
        elements, blocks = int(part.elements[shard]), int(part.blocks[shard])
        if optimizer.momentum is not None:
            momentum += elements * optimizer.momentum.element
            momentum += blocks * SCALE_BYTES if optimizer.momentum.block else 0
        if optimizer.second_moment == "full":
            second_moment += elements * 4
        if part.param_bytes == 2:
            main_weights += elements * optimizer.main_weights.element
        if part.grad_bytes == 2 and optimizer.copies_gradients:
            copies += elements * 4
    if optimizer.second_moment in ("factors", "confidence"):
        second_moment += layout.factors
    if optimizer.second_moment == "confidence":
        second_moment += layout.confidence
    return Components(
        weights=layout.weights,
        gradients=layout.gradients,
        main_weights=main_weights,
        momentum=momentum,
        second_moment=second_moment,
        buffers=copies + (layout.sums if optimizer.sums_over_ranks else 0),
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage, and a rank of it: the one that holds most, if none is named.

    Attributes:
        layout: what its ranks hold.
        shards: which shards that rank holds.
        activations: bytes of activations, by Megatron's estimate.
        layers: number of transformer layers.
    """

    layout: Layout
    shards: tuple[int, int]
    activations: int
    layers: int

    def components(self, optimizer: Optimizer) -> Components:
        """What the rank keeps from step to step."""
        return components(self.layout, optimizer, self.shards)

    def total(self, optimizer: Optimizer) -> int:
        """Bytes of the rank, activations included."""
        return self.components(optimizer).total + self.activations


class Launch:
    """A run that has not been started.

    Args:
        args: Megatron's arguments, validated, with ``padded_vocab_size``; left as they are.

    Raises:
        UnsupportedError: a model that cannot be predicted; the message says why.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.grid = Grid.of(args)

    @cached_property
    def chunks(self) -> list[list[Chunk]]:
        """The model, by pipeline stage."""
        return [build_stage(self.args, self.grid, s) for s in range(self.grid.pipeline)]

    @cached_property
    def stages(self) -> list[Stage]:
        """The pipeline stages of the launch as it is."""
        return self.stages_at(self.grid.data, self.args.micro_batch_size)

    def stages_at(self, data: int, micro_batch: int) -> list[Stage]:
        """The pipeline stages at another data-parallel size and micro-batch size.

        Raises:
            ValueError: a data-parallel size that the layout cannot have.
        """
        args = copy.copy(self.args)
        grid = self.grid
        args.world_size = data * grid.tensor * grid.context * grid.pipeline
        args.data_parallel_size, args.micro_batch_size = data, micro_batch
        grid = Grid.of(args)
        return [_stage(args, grid, number, chunks) for number, chunks in enumerate(self.chunks)]

    def rank(self, stage: int, shards: tuple[int, int]) -> Stage:
        """One rank's stage, seen from that rank.

        Args:
            stage: its number.
            shards: which shards of dense and of experts' parameters the rank holds.
        """
        chunks = build_stage(self.args, self.grid, stage)
        return _stage(self.args, self.grid, stage, chunks, shards)


def _stage(
    args: argparse.Namespace,
    grid: Grid,
    number: int,
    chunks: list[Chunk],
    shards: tuple[int, int] | None = None,
) -> Stage:
    layout = lay_out(args, grid, number, chunks)
    return Stage(
        layout=layout,
        shards=fullest_shard(layout, grid) if shards is None else shards,
        activations=activation_bytes(args, grid, number, chunks),
        layers=sum(chunk.layers for chunk in chunks),
    )


def fullest(stages: list[Stage], optimizer: Optimizer) -> Stage:
    """The stage whose fullest rank holds most."""
    return max(stages, key=lambda stage: stage.total(optimizer))
