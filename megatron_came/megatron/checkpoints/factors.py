"""Factors in Megatron's distributed checkpoints.

Momentum and main weights have the parameter's shape, and Megatron shards them as it shards the
parameter. A factor has one dimension less: it inherits the parameter's tensor-parallel, layer
and expert axes without the dimension that it was averaged over. Ranks that differ along that
dimension alone hold replicas of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_came.core.state import FACTORS
from megatron_came.optimizer import CAME

# Of what :func:`sharded_factors` writes; to be raised by whoever changes that.
FORMAT = 1

# The dimension of the parameter that a factor lacks.
AVERAGED = {
    "exp_avg_sq_row": -1,
    "exp_avg_sq_col": -2,
    "exp_avg_res_row": -1,
    "exp_avg_res_col": -2,
    "exp_avg_sq": None,
}

# A parameter of the model, and what the optimizer updates of it on this rank.
Part = tuple[Tensor, Tensor]
Place = tuple[slice, ...]


def sharded_factors(
    came: CAME, parts: Iterable[Part], model_state: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe all factors for ``dist_checkpointing.save`` or ``load``.

    Args:
        came: the optimizer, with its state.
        parts: in an order that is the same when the checkpoint is loaded at the same layout.
        model_state: the model's sharded state dictionary, made with ``keep_vars=True``.

    Returns:
        ``format`` and ``parameters``: by position of the part and name of the factor, a list of
        pieces with ``values`` (a ``ShardedTensor`` named ``optimizer.state.<factor>.<name of the
        parameter>``) and ``place`` in the factor.

    Raises:
        ValueError: a parameter is not in the model's state, or stored in a way that its factors
            cannot follow.
    """
    entries = {
        id(entry.data): entry
        for entry in nested_values(extract_sharded_tensors_and_factories(model_state)[0])
    }
    parameters: dict[str, Any] = {}
    for position, (param, part) in enumerate(parts):
        if id(param) not in entries:
            raise ValueError(
                f"--optimizer came: a parameter of shape {tuple(param.shape)} is not in the "
                "model's sharded state, so its factors cannot be saved or loaded: give "
                "--no-save-optim to save and --no-load-optim to load, or use --optimizer adam."
            )
        entry, shard = entries[id(param)], came.shard_of(part)
        if isinstance(entry, ShardedTensor) and _cuts(entry) != shard.tp_size:
            raise ValueError(
                f"--optimizer came: {entry.key} is cut into {_cuts(entry)} by tensor parallelism, "
                f"but says that it is cut into {shard.tp_size}, so its statistics are wrong: use "
                "layers that set tensor_model_parallel and partition_dim, or "
                "--tensor-model-parallel-size 1, and start again."
            )
        state = came.state[part]
        parameters[str(position)] = {
            key: [
                {"values": values, "place": LocalNonpersistentObject(place)}
                for values, place in pieces_of(key, state[key], entry, param)
            ]
            for key in FACTORS
            if key in state
        }
    return {"format": FORMAT, "parameters": parameters}


def load_factors(came: CAME, parts: Iterable[Part], loaded: Mapping[str, Any]) -> None:
    """Copy loaded factors into the optimizer's state.

    Args:
        came: the optimizer, with its state.
        parts: as given to :func:`sharded_factors`.
        loaded: what ``dist_checkpointing.load`` has made of its result.

    Raises:
        ValueError: written in a format that this version does not know.
    """
    if loaded.get("format") != FORMAT:
        raise ValueError(unknown_format(loaded.get("format")))
    for position, (_, part) in enumerate(parts):
        state = came.state[part]
        for key, pieces in loaded["parameters"][str(position)].items():
            for piece in pieces:
                state[key][piece["place"]].copy_(piece["values"])


def unknown_format(found: object) -> str:
    """Say that factors are of a format that this version does not know, and what to do."""
    return (
        f"the checkpoint holds CAME's factors in format {found!r}, and this megatron_came reads "
        f"format {FORMAT}: install the version that wrote it, or give --no-load-optim."
    )


def pieces_of(
    key: str, factor: Tensor, entry: ShardedTensor | ShardedTensorFactory, param: Tensor
) -> Iterator[tuple[ShardedTensor, Place]]:
    """Cut a factor as the parameter is cut in the checkpoint (SwiGLU's halves, experts)."""
    axis = AVERAGED[key]
    seen: set[tuple[tuple[int, int], ...]] = set()
    leaves = [entry] if isinstance(entry, ShardedTensor) else nested_values(entry.build())
    for leaf in leaves:
        place = without(place_in(leaf.data, param), axis)
        bounds = tuple((span.start, span.stop) for span in place)
        if bounds in seen:  # halves of the rows have all of the columns: one copy will do
            continue
        seen.add(bounds)
        yield _piece(f"optimizer.state.{key}.{leaf.key}", factor[place], leaf, axis), place


def _piece(key: str, values: Tensor, leaf: ShardedTensor, axis: int | None) -> ShardedTensor:
    replica_id = leaf.replica_id
    if axis is not None:
        pipeline, tensor, data = replica_id
        # Ranks that hold other parts of the averaged dimension hold the same factor.
        replica_id = (pipeline, tensor + leaf.global_offset[axis] // leaf.local_shape[axis], data)
    fragmentations = leaf.axis_fragmentations
    piece = replace(
        leaf,
        key=key,
        data=values,
        dtype=values.dtype,
        local_shape=tuple(values.shape),
        global_shape=without(tuple(leaf.global_shape), axis),
        global_offset=without(tuple(leaf.global_offset), axis),
        axis_fragmentations=None
        if fragmentations is None
        else without(tuple(fragmentations), axis),
        replica_id=replica_id,
    )
    piece.validate_metadata_integrity()
    return piece


def _cuts(entry: ShardedTensor) -> int:
    """Into how many parts the parameter's own dimensions are cut."""
    return math.prod((entry.axis_fragmentations or ())[entry.prepend_axis_num :])


def without(values: tuple[Any, ...], axis: int | None) -> tuple[Any, ...]:
    """Drop one entry, counted from the end."""
    if axis is None:
        return values
    place = len(values) + axis
    return values[:place] + values[place + 1 :]


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
    for total, size in zip(reversed(param.shape), reversed(leaf.shape), strict=True):
        rest, start = divmod(rest, total)
        place.insert(0, slice(start, start + size))
    return tuple(place)
