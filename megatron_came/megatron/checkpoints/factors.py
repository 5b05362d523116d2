"""Factors in Megatron's distributed checkpoints.

Momentum and main weights have the parameter's shape, and Megatron shards them as it shards the
parameter. A factor has one dimension less: it inherits the parameter's tensor-parallel, layer
and expert axes without the dimension that it was averaged over. Ranks that differ along that
dimension alone hold replicas of it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensorFactory
from torch import Tensor

from megatron_came.checkpoint_files.errors import shown
from megatron_came.core.digests import name_of
from megatron_came.core.state import AVERAGED_AXIS, FACTORS, without_averaged_axis
from megatron_came.dtensors import local_of, state_here
from megatron_came.megatron.checkpoints.fsdp2 import whole_leaves
from megatron_came.megatron.parameter_names import ALONE, boxes_in, sharded_entries
from megatron_came.megatron.quantized import is_quantized, plain
from megatron_came.optimizer import CAME

# Of what :func:`sharded_factors` writes; to be raised by whoever changes that.
FORMAT = 1

# A parameter of the model, and what the optimizer updates of it on this rank.
Pair = tuple[Tensor, Tensor]
Place = tuple[slice, ...]


def sharded_factors(
    came: CAME, pairs: Iterable[Pair], model_state: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe all factors for ``dist_checkpointing.save`` or ``load``.

    Args:
        came: the optimizer, with its state.
        pairs: in an order that is the same when the checkpoint is loaded at the same layout.
        model_state: the model's sharded state dictionary, made with ``keep_vars=True``.

    Returns:
        ``format`` and ``parameters``: by position of the pair and name of the factor, a list of
        boxes with ``values`` (a ``ShardedTensor`` named ``optimizer.state.<factor>.<name of the
        parameter>``) and ``place`` in the factor.

    Raises:
        ValueError: a parameter is not in the model's state, or stored in a way that its factors
            cannot follow.
    """
    entries = {id(entry.data): entry for entry in sharded_entries(model_state)}
    parameters: dict[str, Any] = {}
    for position, (param, local) in enumerate(pairs):
        if id(local_of(param)) not in entries:
            raise ValueError(
                f"--optimizer came: a parameter of shape {tuple(param.shape)} is not in the "
                "model's sharded state, so its factors cannot be saved or loaded: give "
                "--no-save-optim to save and --no-load-optim to load, or use --optimizer adam."
            )
        entry, shard = entries[id(local_of(param))], came.shard_of(local)
        leaves, whole = leaves_of(entry, param)
        if isinstance(entry, ShardedTensor) and _cuts(leaves[0]) != shard.tp_size:
            raise ValueError(
                f"--optimizer came: {entry.key} is cut into {_cuts(leaves[0])} by tensor "
                f"parallelism, but says that it is cut into {shard.tp_size}, so its statistics are "
                "wrong: use layers that set tensor_model_parallel and partition_dim, or "
                "--tensor-model-parallel-size 1, and start again."
            )
        state, is_alone = state_here(came.state[local]), getattr(param, ALONE, False)
        parameters[str(position)] = {
            key: [
                {
                    "values": _alone(values) if is_alone else values,
                    "place": LocalNonpersistentObject(place),  # this rank's own, and not saved
                }
                for values, place in boxes_of(key, state[key], leaves, whole)
            ]
            for key in FACTORS
            if key in state
        }
    return {"format": FORMAT, "parameters": parameters}


def load_factors(came: CAME, pairs: Iterable[Pair], loaded: Mapping[str, Any]) -> None:
    """Copy into an optimizer's state what was loaded of :func:`sharded_factors` of the same pairs.

    Raises:
        ValueError: written in a format that this version does not know.
    """
    if loaded.get("format") != FORMAT:
        raise ValueError(unknown_format(loaded.get("format")))
    for position, (_, local) in enumerate(pairs):
        state = state_here(came.state[local])
        for key, boxes in loaded["parameters"][str(position)].items():
            for box in boxes:
                mine = state[key][box["place"]]
                mine.copy_(box["values"].reshape(mine.shape))


def unknown_format(found: object) -> str:
    """Say that factors are of a format that this version does not know, and what to do."""
    return (
        f"the checkpoint holds CAME's factors in format {shown(found)}, and this megatron_came "
        f"reads format {FORMAT}: install the version that wrote it, or give --no-load-optim."
    )


def leaves_of(
    entry: ShardedTensor | ShardedTensorFactory, param: Tensor
) -> tuple[Sequence[ShardedTensor], Tensor]:
    """Return how a parameter is cut in the checkpoint (SwiGLU's halves, experts), and it.

    Raises:
        ValueError: as :func:`.fsdp2.whole_leaves` has it.
    """
    param = plain(param)
    leaves = cuts_of(entry, param)
    return whole_leaves(leaves, param, is_stacked=not isinstance(entry, ShardedTensor))


def cuts_of(entry: ShardedTensor | ShardedTensorFactory, values: Tensor) -> list[ShardedTensor]:
    """Return the boxes that an entry consists of: of these values, where its own are quantised."""
    if is_quantized(entry.data):
        entry = replace(entry, data=values)
    return boxes_in(entry)


def boxes_of(
    key: str, factor: Tensor, leaves: Iterable[ShardedTensor], param: Tensor
) -> Iterator[tuple[ShardedTensor, Place]]:
    """Cut a factor as the parameter is cut, see :func:`leaves_of`."""
    seen: set[tuple[tuple[int, int], ...]] = set()
    for leaf in leaves:
        place = without_averaged_axis(key, place_in(leaf.data, param))
        bounds = tuple((axis.start, axis.stop) for axis in place)
        if bounds in seen:  # halves of the rows have all of the columns: one copy will do
            continue
        seen.add(bounds)
        yield _box(key, factor[place], leaf), place


def _box(key: str, values: Tensor, leaf: ShardedTensor) -> ShardedTensor:
    axis, replica_id = AVERAGED_AXIS[key], leaf.replica_id
    if axis is not None:
        pipeline, tensor, data = replica_id
        # Ranks that hold other parts of the averaged dimension hold the same factor.
        replica_id = (pipeline, tensor + leaf.global_offset[axis] // leaf.local_shape[axis], data)
    fragmentations = leaf.axis_fragmentations
    box = replace(
        leaf,
        key=f"optimizer.state.{key}.{leaf.key}",
        data=values,
        dtype=values.dtype,
        local_shape=tuple(values.shape),
        global_shape=without_averaged_axis(key, tuple(leaf.global_shape)),
        global_offset=without_averaged_axis(key, tuple(leaf.global_offset)),
        axis_fragmentations=None
        if fragmentations is None
        else without_averaged_axis(key, tuple(fragmentations)),
        replica_id=replica_id,
    )
    box.validate_metadata_integrity()
    return box


def _alone(box: ShardedTensor) -> ShardedTensor:
    """Return a box of one layer or expert as that of a tensor of its own."""
    axes = box.prepend_axis_num
    ones, at = (1,) * axes, tuple(box.global_offset[:axes])
    own = replace(
        box,
        key=name_of(box.key, at),
        data=box.data[(None,) * axes],
        local_shape=(*ones, *box.local_shape),
        global_shape=(*ones, *box.global_shape[axes:]),
        global_offset=(*(0 for _ in at), *box.global_offset[axes:]),
        axis_fragmentations=(*ones, *(box.axis_fragmentations or ())[axes:]),
        prepend_axis_num=0,
    )
    own.validate_metadata_integrity()
    return own


def _cuts(entry: ShardedTensor) -> int:
    """Into how many boxes the parameter's own dimensions are cut."""
    return math.prod((entry.axis_fragmentations or ())[entry.prepend_axis_num :])


def place_in(leaf: Tensor, param: Tensor) -> Place:
    """Find which box of a parameter a view of it is.

    Raises:
        ValueError: it is not a box of the parameter.
    """
    inside = leaf.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
    if not inside or leaf.dim() != param.dim() or leaf.stride() != param.stride():
        raise ValueError(
            f"--optimizer came: a parameter of shape {tuple(param.shape)} is stored in the "
            "checkpoint in a way that its factors cannot follow; save with --no-save-optim, or "
            "use --optimizer adam."
        )
    rest = int(leaf.storage_offset()) - int(param.storage_offset())
    place: list[slice] = []
    # Both lie in C order, so that the distance of their first elements has the indices as digits.
    for total, size in zip(reversed(param.shape), reversed(leaf.shape), strict=True):
        rest, start = divmod(rest, max(total, 1))
        place.insert(0, slice(start, start + size))
    return tuple(place)
