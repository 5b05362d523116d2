"""Names of parameters, and places of their parts, that are the same in every layout.

Momentum in 16 or 8 bits is rounded with random bits that depend on both. The model's sharded state
dictionary knows them: it is what makes checkpoints independent of the layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_came.megatron.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Place:
    """A model parameter's place in the whole model.

    Attributes:
        name: with its layer and expert.
        offsets: where each of its parts (two for SwiGLU's stacked projections, otherwise one)
            begins in the full tensor.
    """

    name: str
    offsets: tuple[tuple[int, ...], ...]

    def check(self, shape: tuple[int, ...], tp_dim: int, tp_size: int, tp_rank: int) -> None:
        """Make sure that tensor parallelism cuts the parameter into these places.

        Args:
            shape: of the local tensor.
            tp_dim: dimension along which it is cut.
            tp_size: into how many local tensors.
            tp_rank: which of them this is.

        Raises:
            UnsupportedError: it cuts otherwise, such as a Mamba layer's projections, which are
                stacked and of unlike sizes.
        """
        parts, rows = len(self.offsets), max(len(shape) - 2, 0)
        if shape[tp_dim] % parts or (parts > 1 and tp_dim != rows):
            raise self._refusal(shape)
        size = shape[tp_dim] // parts
        for part, offsets in enumerate(self.offsets):
            expected = [0] * len(shape)
            expected[tp_dim] = (part * tp_size + tp_rank) * size
            if list(offsets) != expected:
                raise self._refusal(shape)

    def _refusal(self, shape: tuple[int, ...]) -> UnsupportedError:
        return UnsupportedError(
            f"--came-momentum-dtype: {self.name} of shape {shape} is cut by tensor "
            "parallelism in a way that the random bits of its rounding cannot follow: use "
            "--came-momentum-dtype fp32, or --tensor-model-parallel-size 1."
        )


def places(model_chunks: Iterable[Any]) -> dict[Tensor, Place]:
    """Find the places of the parameters of a model.

    Args:
        model_chunks: modules of Megatron.
    """
    found: dict[Tensor, Place] = {}
    for chunk in model_chunks:
        state = extract_sharded_tensors_and_factories(chunk.sharded_state_dict())[0]
        for entry in nested_values(state):
            single = isinstance(entry, ShardedTensor)
            leaves = [entry] if single else list(nested_values(entry.build()))
            axes = leaves[0].prepend_axis_num
            above = "".join(f"[{offset}]" for offset in leaves[0].global_offset[:axes])
            found[entry.data] = Place(
                name=leaves[0].key + above,
                offsets=tuple(tuple(leaf.global_offset[axes:]) for leaf in leaves),
            )
    return found


def place_of(param: Tensor, known: dict[Tensor, Place]) -> Place:
    """Return a parameter's place.

    Raises:
        UnsupportedError: the model's sharded state does not hold it.
    """
    if param not in known:
        raise UnsupportedError(
            f"--came-momentum-dtype: a parameter of shape {tuple(param.shape)} is not in the "
            "model's sharded state, which names parameters alike in every layout: use "
            "--came-momentum-dtype fp32."
        )
    return known[param]
