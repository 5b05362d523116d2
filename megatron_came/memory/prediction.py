"""The memory of every rank of a run, from its flags alone."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import cached_property

from megatron.core import __version__
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_came.megatron.errors import UnsupportedError
from megatron_came.memory.activations import activation_bytes
from megatron_came.memory.buffers import Layout, full_parameters, fullest_shards, lay_out
from megatron_came.memory.components import Components
from megatron_came.memory.grid import Grid
from megatron_came.memory.meta_model import Chunk, build_stage
from megatron_came.memory.precisions import SCALE_BYTES, Optimizer


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
        UnsupportedError: a release of Megatron that does not tell how it lays memory out.
        ValueError: parallel sizes that do not fit into each other.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if not hasattr(DistributedOptimizer, "compute_full_param_layout"):
            raise UnsupportedError(
                f"memory is laid out by functions of Megatron 0.19, and this is {__version__}: "
                "predict it with megatron-core 0.19."
            )
        self.args = args
        self.grid = Grid.of(args)
        self._layouts: dict[int, list[tuple[Layout, tuple[int, int]]]] = {}

    @cached_property
    def chunks(self) -> list[list[Chunk]]:
        """The model, by pipeline stage.

        Raises:
            UnsupportedError: a model that cannot be predicted; the message says why.
        """
        return [build_stage(self.args, self.grid, s) for s in range(self.grid.pipeline)]

    @property
    def parameters(self) -> int:
        """Number of elements of the whole model's weights."""
        return sum(full_parameters(chunk, self.grid) for chunks in self.chunks for chunk in chunks)

    @cached_property
    def stages(self) -> list[Stage]:
        """The pipeline stages of the launch as it is, each with its fullest rank."""
        return self.stages_at(self.grid.data, self.args.micro_batch_size)

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
        if data not in self._layouts:
            layouts = [lay_out(args, grid, s, chunks) for s, chunks in enumerate(self.chunks)]
            self._layouts[data] = [(each, fullest_shards(each, grid)) for each in layouts]
        return [
            _stage(args, grid, layout, chunks, shards)
            for (layout, shards), chunks in zip(self._layouts[data], self.chunks, strict=True)
        ]

    @property
    def has_global_batch(self) -> bool:
        """Whether the global batch size was given."""
        return bool(getattr(self.args, "_is_global_batch_size_explicitly_specified", True))

    def rank(self, stage: int, shards: tuple[int, int]) -> Stage:
        """One rank's stage, seen from that rank.

        Args:
            stage: its number.
            shards: which shards of dense and of experts' parameters the rank holds.

        Raises:
            UnsupportedError: a model that cannot be predicted; the message says why.
        """
        chunks = build_stage(self.args, self.grid, stage)
        layout = lay_out(self.args, self.grid, stage, chunks)
        return _stage(self.args, self.grid, layout, chunks, shards)


def _stage(
    args: argparse.Namespace,
    grid: Grid,
    layout: Layout,
    chunks: list[Chunk],
    shards: tuple[int, int],
) -> Stage:
    return Stage(
        layout=layout,
        shards=shards,
        activations=activation_bytes(args, grid, layout.stage, chunks),
        layers=sum(chunk.layers for chunk in chunks),
    )


def fullest(stages: list[Stage], optimizer: Optimizer) -> Stage:
    """The stage whose fullest rank holds most."""
    return max(stages, key=lambda stage: stage.total(optimizer))
