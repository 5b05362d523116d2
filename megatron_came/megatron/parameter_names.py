"""What a parameter is in every layout alike: its name, its place in the whole model, its settings.

Momentum in 16 or 8 bits is rounded with random bits that depend on both. The model's sharded state
dictionary knows them: it is what makes checkpoints independent of the layout.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_came.core.digests import name_of
from megatron_came.dtensors import local_of
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.voice import say_once

# Where a parameter has settings of its own, by name, and the one that is no hyperparameter.
OWN_SETTINGS = "came_own_settings"
FACTORED = "factored"
# Where checkpoints hold its factors by itself, since other layers of its tensor are frozen.
ALONE = "came_is_alone"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a parameter is in the whole model."""

    name: str  # with its layer and expert
    # Where it begins in the full tensor; two of them for SwiGLU's projections, which are stacked.
    offsets: tuple[tuple[int, ...], ...]
    is_local: bool = False  # what a rank has of a parameter, where no place in the whole fits

    def fits(self, shape: tuple[int, ...], tp_dim: int, tp_size: int, tp_rank: int) -> bool:
        """Whether tensor parallelism cuts a parameter of this local shape so that it begins there.

        It cuts otherwise a Mamba layer's projections, which are stacked and of unlike sizes.
        """
        stacked, rows = len(self.offsets), max(len(shape) - 2, 0)  # the dimension of rows
        size, rest = divmod(shape[tp_dim], stacked)
        expected = [[0] * len(shape) for _ in self.offsets]
        for position, offsets in enumerate(expected):
            offsets[tp_dim] = (position * tp_size + tp_rank) * size
        begins = [list(offsets) for offsets in self.offsets] == expected
        return begins and not rest and (stacked == 1 or tp_dim == rows)


def named_parameters(model_chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Name a rank's parameters, without Megatron's wrappers; with their chunk, of several."""
    for index, chunk in enumerate(model_chunks):
        prefix = f"chunk {index} " if len(model_chunks) > 1 else ""
        named = chunk.named_parameters()
        if hasattr(chunk, "param_and_grad_buffer"):
            # During an iteration Megatron-FSDP has others in their place, at times without memory.
            named = chunk.param_and_grad_buffer.optimizer_named_parameters
        for name, param in named:
            yield prefix + within_wrappers(name), param


def within_wrappers(name: str) -> str:
    """Return a name without Megatron's wrappers of a model."""
    return re.sub(r"^(module\.)+", "", name)


def sharded_entries(state: Mapping[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """Return what a sharded state dictionary holds of tensors."""
    return iter(nested_values(extract_sharded_tensors_and_factories(dict(state))[0]))


def boxes_in(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the boxes that an entry consists of: SwiGLU's halves, experts, or itself."""
    return [entry] if isinstance(entry, ShardedTensor) else list(nested_values(entry.build()))


def identities(model_chunks: Iterable[Any]) -> dict[Tensor, Identity]:
    """Identify the parameters of a model, given its modules."""
    found: dict[Tensor, Identity] = {}
    for chunk in model_chunks:
        for entry in sharded_entries(chunk.sharded_state_dict()):
            leaves = boxes_in(entry)
            axes = leaves[0].prepend_axis_num
            found[entry.data] = Identity(
                name=name_of(leaves[0].key, leaves[0].global_offset[:axes]),
                offsets=tuple(tuple(leaf.global_offset[axes:]) for leaf in leaves),
            )
    return found


def identity_of(
    param: Tensor, known: dict[Tensor, Identity], tp_group: dist.ProcessGroup
) -> Identity:
    """Return a parameter's identity; that of the rank's own tensor where it fits no whole one.

    Raises:
        UnsupportedError: the model's sharded state does not hold it.
    """
    local = local_of(param)  # Megatron's sharded state has those of FSDP2
    if local not in known:
        raise UnsupportedError(
            f"--came-momentum-dtype: a parameter of shape {tuple(param.shape)} is not in the "
            "model's sharded state, which names parameters alike in every layout: use "
            "--came-momentum-dtype fp32."
        )
    identity, tp_dim = known[local], getattr(param, "partition_dim", -1)
    is_cut = getattr(param, "tensor_model_parallel", False) and 0 <= tp_dim < param.dim()
    if not is_cut or tp_group.size() == 1:
        return identity
    rank = tp_group.rank()
    # An unfactored tensor is a vector, of which a cut into columns is no range.
    in_one_range = is_factored(param) or math.prod(param.shape[:tp_dim]) == 1
    if in_one_range and identity.fits(tuple(param.shape), tp_dim, tp_group.size(), rank):
        return identity
    say_once(
        "--came-momentum-dtype: where tensor parallelism cuts a weight into unlike parts, as "
        "Mamba's projections, or an unfactored one into columns, every rank rounds momentum with "
        "random bits of its own, so that another --tensor-model-parallel-size rounds otherwise "
        "(with fp32 it does not)."
    )
    return Identity(f"{identity.name} of tensor-parallel rank {rank}", ((0,),), is_local=True)


def original_of(param: Tensor) -> Tensor:
    """Return the parameter for which Megatron-FSDP has a DTensor; any other itself."""
    original: Tensor = getattr(param, "orig_param", param)
    return original


def own_settings(param: Tensor) -> dict[str, Any]:
    """Return the hyperparameters that ``--came-rule`` has given a parameter, by field."""
    own: dict[str, Any] = getattr(param, OWN_SETTINGS, {})
    return {name: value for name, value in own.items() if name != FACTORED}


def is_factored(param: Tensor) -> bool:
    """Whether ``--came-rule`` leaves a parameter's second moment factored."""
    return bool(getattr(param, OWN_SETTINGS, {}).get(FACTORED, True))
