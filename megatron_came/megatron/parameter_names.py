"""What a parameter is in every layout alike: its name, and where it lies in the whole model.

Momentum in 16 or 8 bits is rounded with random bits that depend on both. The model's sharded state
dictionary knows them: it is what makes checkpoints independent of the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_came.megatron.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Identity:
    """What a parameter is in the whole model.

    Attributes:
        name: with its layer and expert.
        offsets: where it begins in the full tensor; two of them for SwiGLU's projections, which are
            stacked.
    """

    name: str
    offsets: tuple[tuple[int, ...], ...]

    def check(self, shape: tuple[int, ...], tp_dim: int, tp_size: int, tp_rank: int) -> None:
        """Make sure that tensor parallelism cuts the parameter so that it begins there.

        Args:
            shape: of the local tensor.
            tp_dim: dimension along which it is cut.
            tp_size: into how many local tensors.
            tp_rank: which of them this is.

        Raises:
            UnsupportedError: it cuts otherwise, such as a Mamba layer's projections, which are
                stacked and of unlike sizes.
        """
        stacked, rows = len(self.offsets), max(len(shape) - 2, 0)
        size, rest = divmod(shape[tp_dim], stacked)
        expected = [[0] * len(shape) for _ in self.offsets]
        for position, offsets in enumerate(expected):
            offsets[tp_dim] = (position * tp_size + tp_rank) * size
        fits = not rest and (stacked == 1 or tp_dim == rows)
        if not fits or [list(offsets) for offsets in self.offsets] != expected:
            raise UnsupportedError(
                f"--came-momentum-dtype: {self.name} of shape {shape} is cut by tensor "
                "parallelism in a way that the random bits of its rounding cannot follow: use "
                "--came-momentum-dtype fp32, or --tensor-model-parallel-size 1."
            )


def named_parameters(model_chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Name a rank's parameters, without Megatron's wrappers; with their chunk, of several."""
    for index, chunk in enumerate(model_chunks):
        prefix = f"chunk {index} " if len(model_chunks) > 1 else ""
        for name, param in chunk.named_parameters():
            yield prefix + re.sub(r"^(module\.)+", "", name), param


def identities(model_chunks: Iterable[Any]) -> dict[Tensor, Identity]:
    """Identify the parameters of a model, given its modules."""
    found: dict[Tensor, Identity] = {}
    for chunk in model_chunks:
        state = extract_sharded_tensors_and_factories(chunk.sharded_state_dict())[0]
        for entry in nested_values(state):
            single = isinstance(entry, ShardedTensor)
            leaves = [entry] if single else list(nested_values(entry.build()))
            axes = leaves[0].prepend_axis_num
            above = "".join(f"[{offset}]" for offset in leaves[0].global_offset[:axes])
            found[entry.data] = Identity(
                name=leaves[0].key + above,
                offsets=tuple(tuple(leaf.global_offset[axes:]) for leaf in leaves),
            )
    return found


def identity_of(param: Tensor, known: dict[Tensor, Identity]) -> Identity:
    """Return a parameter's identity.

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
