"""The sizes of a parallel layout."""

import argparse
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from megatron_came.memory.optimizers import is_cut


@dataclass(frozen=True, slots=True)
class Grid:
    """Into how many ranks a run is cut, and along what.

    Raises:
        ValueError: sizes that do not fit into each other.
    """

    world: int  # number of ranks
    tensor: int  # tensor-parallel size of dense layers
    pipeline: int  # number of pipeline stages
    virtual: int | None  # model chunks of a stage; None without virtual stages
    context: int  # context-parallel size
    expert: int  # expert-parallel size
    expert_tensor: int  # tensor-parallel size of experts
    instances: int  # distributed-optimizer instances
    sharded: bool  # whether data-parallel ranks share the optimizer's state

    def __post_init__(self) -> None:
        for sizes, product in (
            ("tensor x context x pipeline", self.tensor * self.context * self.pipeline),
            ("expert-tensor x expert x pipeline", self.expert_tensor * self.expert * self.pipeline),
        ):
            if self.world % product:
                raise ValueError(
                    f"{self.world} ranks cannot be cut into {sizes} parallel size {product}."
                )
        for ranks in (self.data * self.context, self.expert_data):
            if ranks % self.instances:
                raise ValueError(
                    f"--num-distributed-optimizer-instances {self.instances} does not divide "
                    f"{ranks} data-parallel ranks."
                )

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Take the sizes from Megatron's validated arguments."""
        return cls(
            world=args.world_size,
            tensor=args.tensor_model_parallel_size,
            pipeline=args.pipeline_model_parallel_size,
            virtual=args.virtual_pipeline_model_parallel_size,
            context=args.context_parallel_size,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size,
            instances=args.num_distributed_optimizer_instances,
            sharded=is_cut(args),
        )

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tensor * self.context * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Data-parallel size of the experts."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def shards(self) -> tuple[int, int]:
        """How many shards the distributed optimizer cuts a dense and an expert's parameter into."""
        if not self.sharded:
            return 1, 1
        return self.data * self.context // self.instances, self.expert_data // self.instances

    def shards_of_ranks(self) -> tuple[Tensor, Tensor]:
        """Which shards of dense and of experts' parameters the ranks of a stage hold.

        In the order of Megatron's ranks: tensor parallelism is innermost, then come context (or
        expert) and data parallelism.
        """
        ranks = torch.arange(self.world // self.pipeline, device="cpu")
        dense, experts = self.shards
        return ranks // self.tensor % dense, ranks // (self.expert_tensor * self.expert) % experts

    def with_data(self, data: int) -> Self:
        """The same layout at another data-parallel size.

        Raises:
            ValueError: a size that it cannot have.
        """
        return replace(self, world=data * self.tensor * self.context * self.pipeline)
