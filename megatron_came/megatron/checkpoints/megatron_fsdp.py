"""State with ``--use-megatron-fsdp`` in checkpoints of ``--ckpt-format fsdp_dtensor``.

Megatron saves the model as DTensors of the rows that each rank happens to hold. So is momentum
saved; factors are DTensors that are whole on all data-parallel ranks and cut as their parameter is
by tensor parallelism. Names are those of ``torch_dist``, ``optimizer.state.<key>.<parameter>``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
    gather_and_compute_chunk_metadata,
)
from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_swiglu_in_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_came.checkpoint_files.torch_dist import Layout
from megatron_came.core.digests import KEY, PlacedBox
from megatron_came.core.momentum import MOMENTUM
from megatron_came.core.state import FACTORS, without_averaged_axis
from megatron_came.dtensors import local_of
from megatron_came.megatron.checkpoints.factors import Pair
from megatron_came.megatron.rank_settings import arguments
from megatron_came.optimizer import CAME

# What Megatron appends to the names of SwiGLU's two projections, which lie in one parameter.
_HALVES = ("_w", "_v")


def named_parameters(chunk: torch.nn.Module) -> dict[str, Any]:
    """The DTensors of a model, by the name that a checkpoint has after ``model.``."""
    state = chunk.state_dict(keep_vars=True)  # puts DTensors in the place of gathered parameters
    return {name: each for name, each in state.items() if isinstance(each, DTensor)}


class Slice(NamedTuple):
    """What a rank holds of a parameter.

    Attributes:
        param: the DTensor.
        start: its first element in what this tensor-parallel rank has; None if it is all of that.
        shape: of what this tensor-parallel rank has.
        boxes: of that, by name in the checkpoint.
        is_first: whether its tensor-parallel rank stands for all that hold the same.
        is_main: whether the rank does so among data-parallel ranks, too.
    """

    param: Any
    start: int | None
    shape: tuple[int, ...]
    boxes: dict[str, PlacedBox]
    is_first: bool
    is_main: bool


def holds(chunk: torch.nn.Module) -> bool:
    """Whether Megatron-FSDP holds a model; if so, DTensors take the place of its parameters."""
    if not any(hasattr(param, "__fsdp_param__") for param in chunk.parameters()):
        return False
    named_parameters(chunk)
    return True


def slices_of(chunk: torch.nn.Module) -> Iterator[Slice]:
    """Say where what this rank holds of a model lies; a collective."""
    params = named_parameters(chunk)
    for name, parts in _parted(chunk, params).items():
        param = params[name]
        index, cut = param.megatron_fsdp_dist_index, _cut_of(param)
        tp_rank = index.get_submesh([index.tp_dim]).get_local_rank()
        shape = tuple(param.orig_param.shape)
        size = (shape[0] // len(parts), *shape[1:])
        offset = [0] * len(shape)
        if cut is not None:
            offset[cut.dim] = tp_rank * size[cut.dim]
        boxes = {
            part: PlacedBox(
                (number * size[0], *(0 for _ in shape[1:])),
                size,
                tuple(offset),
                tuple(tensor.shape),
            )
            for number, (part, tensor) in enumerate(parts.items())
        }
        is_first = cut is not None or tp_rank == 0
        is_main = is_first and param.device_mesh.get_local_rank(0) == 0
        yield Slice(param, _start(param, cut, tp_rank), shape, boxes, is_first, is_main)


def _start(param: Any, cut: _Cut | None, tp_rank: int) -> int | None:
    """The first element that this rank holds; None if it holds all. A collective."""
    cuts = [at for at, each in enumerate(param.placements) if isinstance(each, Shard)]
    if cuts == ([] if cut is None else [cut.mesh_dim]):
        return None
    row = gather_and_compute_chunk_metadata(param).offsets[0]
    above = tp_rank * len(param.orig_param) if cut is not None and cut.dim == 0 else 0
    return int((row - above) * math.prod(param.orig_param.shape[1:]))


class _Cut(NamedTuple):
    """Along which dimension of its mesh tensor parallelism cuts which of a parameter's."""

    mesh_dim: int
    dim: int


def _cut_of(param: Any) -> _Cut | None:
    names, tp = param.device_mesh.mesh_dim_names, param.megatron_fsdp_dist_index.tp_dim
    for mesh_dim, (name, each) in enumerate(zip(names, param.placements, strict=True)):
        if name == tp and isinstance(each, Shard):
            return _Cut(mesh_dim, each.dim)
    return None


def _parted(
    chunk: torch.nn.Module, tensors: Mapping[str, DTensor]
) -> dict[str, dict[str, DTensor]]:
    """Take SwiGLU's projections apart, by name of the parameter; on the same memory."""
    if not arguments().get("swiglu"):  # as Megatron does, whatever other activation has a gate
        return {name: {name: tensor} for name, tensor in tensors.items()}
    parted, _ = handle_swiglu_in_state_dict(
        torch.nn.ModuleDict({"module": chunk}), dict(tensors), None
    )
    return {
        name: {name: parted[name]}
        if name in parted
        else {name + half: parted[name + half] for half in _HALVES}
        for name in tensors
    }


def sharded_state(came: CAME, pairs: Iterable[Pair], chunk: torch.nn.Module) -> dict[str, Any]:
    """Describe momentum and factors for ``torch.distributed.checkpoint``, which fills these.

    Args:
        came: the optimizer, with its state.
        pairs: the model's DTensors, and what the optimizer updates of them.
        chunk: the model, without its wrappers.
    """
    params = named_parameters(chunk)
    local = {id(param): own for param, own in pairs}
    states = {
        name: came.state[local[id(param)]] for name, param in params.items() if id(param) in local
    }
    momentum = {name: _like(params[name], state[MOMENTUM]) for name, state in states.items()}
    found: dict[str, dict[str, DTensor]] = {key: {} for key in (MOMENTUM, *FACTORS)}
    for name, parts in _parted(chunk, momentum).items():
        found[MOMENTUM] |= parts
        for key in FACTORS:
            if key in states[name]:
                found[key] |= _factors(key, states[name][key], params[name], [*parts])
    return {key: named for key, named in found.items() if named}


def complete(state: Any, layout: Layout, asked: Mapping[str, Any] | None) -> None:
    """Add to what Megatron has read of a checkpoint what it does not ask for.

    Args:
        state: what it has read; all that it holds beside tensors if nothing was asked for.
        layout: of the checkpoint.
        asked: for what.

    Raises:
        CheckpointError: it cannot be read.
    """
    entries = layout.entries()
    state["content_metadata"] = {"distrib_optim_sharding_type": "fsdp_dtensor"}
    if KEY in entries:
        state[KEY] = entries[KEY]
    if asked is None:
        names = ("optimizer", "opt_param_scheduler")
        state |= {name: entries[name] for name in names if name in entries}
        return
    if "optimizer" in state:
        state["optimizer"]["param_groups"] = entries.get("optimizer", {}).get("param_groups")
    if "rng_state" in asked:  # as it is where the checkpoint has none that fits
        state.setdefault("rng_state", asked["rng_state"])


def _like(param: Any, values: Tensor) -> DTensor:
    return DTensor.from_local(
        values.view(local_of(param).shape),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _factors(key: str, factor: Tensor, param: Any, names: list[str]) -> dict[str, DTensor]:
    """A factor, or those of SwiGLU's two projections, which share what is averaged over rows."""
    kept = without_averaged_axis(key, tuple(range(param.dim())))
    mesh, cut = param.device_mesh, _cut_of(param)
    placements: list[Any] = [Replicate()] * mesh.ndim
    if cut is not None and cut.dim in kept:
        placements[cut.mesh_dim] = Shard(kept.index(cut.dim))
    halves = factor.chunk(len(names)) if 0 in kept else (factor,)
    named = {}
    for name, half in zip(names, halves, strict=False):
        shape = list(half.shape)
        for mesh_dim, each in enumerate(placements):
            if isinstance(each, Shard):
                shape[each.dim] *= mesh.size(mesh_dim)
        named[name] = DTensor.from_local(
            half,
            mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
    return named
