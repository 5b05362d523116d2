"""The named boxes that a parameter consists of in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_came.core.digests import Box, name_of
from megatron_came.megatron.checkpoints.factors import place_in


@dataclass(frozen=True, slots=True)
class Leaf:
    """A box of a tensor of the model, as the checkpoint names it.

    Attributes:
        name: with its layer and expert.
        values: of the box on this rank.
        box: where it lies in the rank's own tensor and in the whole one.
        is_view: whether it lies in the rank's own tensor at all.
        is_main: whether this rank stands for all that hold the same.
        is_first: whether it does so together with its data-parallel group.
    """

    name: str
    values: Tensor
    box: Box
    is_view: bool
    is_main: bool
    is_first: bool

    @property
    def alone(self) -> Box:
        """The box of :attr:`values` themselves."""
        zeros = (0,) * len(self.box.size)
        return Box(zeros, self.box.size, self.box.offset, self.box.shape)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the model: Megatron's own entry in the sharded state, and its boxes."""

    sharded: ShardedTensor | ShardedTensorFactory
    leaves: tuple[Leaf, ...]


def unwrapped(model: Any) -> list[Any]:
    """Return the chunks of a model without what Megatron has wrapped around them."""
    chunks = []
    for chunk in model if isinstance(model, list) else [model]:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        chunks.append(chunk)
    return chunks


def entries_of(model_chunks: Iterable[Any]) -> dict[int, Entry]:
    """Return the tensors of a model, by ``id`` of the parameter or buffer.

    Args:
        model_chunks: modules of Megatron, without their wrappers.
    """
    found: dict[int, Entry] = {}
    for chunk in model_chunks:
        state = extract_sharded_tensors_and_factories(chunk.sharded_state_dict())[0]
        for entry in nested_values(state):
            single = isinstance(entry, ShardedTensor)
            leaves = [entry] if single else list(nested_values(entry.build()))
            found[id(entry.data)] = Entry(
                entry, tuple(_leaf(leaf, entry.data) for leaf in leaves if leaf.data is not None)
            )
    return found


def _leaf(leaf: ShardedTensor, whole: Tensor) -> Leaf:
    axes = leaf.prepend_axis_num
    size, offset = tuple(leaf.data.shape), tuple(leaf.global_offset[axes:])
    try:
        place: tuple[int, ...] | None = tuple(s.start for s in place_in(leaf.data, whole))
    except ValueError:
        place = None
    replica = leaf.replica_id if isinstance(leaf.replica_id, tuple) else (leaf.replica_id,)
    return Leaf(
        name=name_of(leaf.key, tuple(leaf.global_offset[:axes])),
        values=leaf.data,
        box=Box(place or (0,) * len(size), size, offset, tuple(leaf.global_shape[axes:])),
        is_view=place is not None,
        is_main=is_main_replica(leaf.replica_id),
        is_first=not any(replica[:-1]),
    )
