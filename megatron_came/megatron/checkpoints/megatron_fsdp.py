"""State with ``--use-megatron-fsdp`` in checkpoints of ``--ckpt-format fsdp_dtensor``.

Megatron saves the model as DTensors of the rows that each rank happens to hold. So is momentum
saved; factors are DTensors that are whole on all data-parallel ranks and cut as their parameter is
by tensor parallelism. Names are those of ``torch_dist``, ``optimizer.state.<key>.<parameter>``.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
    gather_and_compute_chunk_metadata,
)
from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_swiglu_in_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_came.checkpoint_files.torch_dist import Layout
from megatron_came.core.momentum import MOMENTUM
from megatron_came.core.records import KEY
from megatron_came.core.state import FACTORS, without_averaged_axis
from megatron_came.dtensors import local_of, placed
from megatron_came.megatron.checkpoints.factors import Pair
from megatron_came.megatron.run import arguments
from megatron_came.optimizer import CAME

# What Megatron appends to the names of SwiGLU's two projections, which lie in one parameter.
_HALVES = ("_w", "_v")


def named_parameters(chunk: torch.nn.Module) -> dict[str, Any]:
    """The DTensors of a model, by the name that a checkpoint has after ``model.``."""
    state = chunk.state_dict(keep_vars=True)  # puts DTensors in the place of gathered parameters
    return {name: each for name, each in state.items() if isinstance(each, DTensor)}


def holds(chunk: torch.nn.Module) -> bool:
    """Whether Megatron-FSDP holds a model; if so, DTensors take the place of its parameters."""
    # Megatron-FSDP's mark of its parameters.
    if not any(hasattr(param, "__fsdp_param__") for param in chunk.parameters()):
        return False
    named_parameters(chunk)
    return True


class Cut(NamedTuple):
    """Along which dimension of its mesh tensor parallelism cuts which of a parameter's."""

    mesh_dim: int
    dim: int


def start_of(param: Any, cut: Cut | None, tp_rank: int) -> int | None:
    """The first element that this rank holds; None if it holds all. A collective."""
    cuts = [at for at, each in enumerate(param.placements) if isinstance(each, Shard)]
    if cuts == ([] if cut is None else [cut.mesh_dim]):
        return None
    row = gather_and_compute_chunk_metadata(param).offsets[0]
    # Offsets are of the whole tensor, a slice begins in this rank's part of it.
    above = tp_rank * len(param.orig_param) if cut is not None and cut.dim == 0 else 0
    return int((row - above) * math.prod(param.orig_param.shape[1:]))


def cut_of(param: Any) -> Cut | None:
    """Return how tensor parallelism cuts a DTensor; None if it does not."""
    names, tp = param.device_mesh.mesh_dim_names, param.megatron_fsdp_dist_index.tp_dim
    for mesh_dim, (name, each) in enumerate(zip(names, param.placements, strict=True)):
        if name == tp and isinstance(each, Shard):
            return Cut(mesh_dim, each.dim)
    return None


def parted(chunk: torch.nn.Module, tensors: Mapping[str, DTensor]) -> dict[str, dict[str, DTensor]]:
    """Take SwiGLU's projections apart, by name of the parameter; on the same memory."""
    if not arguments().get("swiglu"):  # as Megatron does, whatever other activation has a gate
        return {name: {name: tensor} for name, tensor in tensors.items()}
    # It looks for the weights in a wrapper of the model.
    wrapper = torch.nn.ModuleDict({"module": chunk})
    parted, _ = handle_swiglu_in_state_dict(wrapper, dict(tensors), None)
    return {
        name: {name: parted[name]}
        if name in parted
        else {name + half: parted[name + half] for half in _HALVES}
        for name in tensors
    }


def sharded_state(came: CAME, pairs: Iterable[Pair], chunk: torch.nn.Module) -> dict[str, Any]:
    """Describe momentum and factors for ``torch.distributed.checkpoint``, which fills these.

    Pairs are the DTensors of a model without its wrappers, and what the optimizer updates of them.
    """
    params = named_parameters(chunk)
    local = {id(param): own for param, own in pairs}
    states = {
        name: came.state[local[id(param)]] for name, param in params.items() if id(param) in local
    }
    momentum = {
        name: placed(state[MOMENTUM].view(local_of(p).shape), p.device_mesh, p.placements, p.shape)
        for name, state in states.items()
        for p in [params[name]]
    }
    found: dict[str, dict[str, DTensor]] = {key: {} for key in (MOMENTUM, *FACTORS)}
    for name, parts in parted(chunk, momentum).items():
        found[MOMENTUM] |= parts
        for key in FACTORS:
            if key in states[name]:
                found[key] |= _factors(key, states[name][key], params[name], [*parts])
    return {key: named for key, named in found.items() if named}


def complete(state: Any, layout: Layout, asked: Mapping[str, Any] | None) -> None:
    """Add to what Megatron has read of a checkpoint what it does not ask for.

    If nothing was asked for, that is all that the checkpoint holds beside tensors.

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


def _factors(key: str, factor: Tensor, param: Any, names: list[str]) -> dict[str, DTensor]:
    """A factor, or those of SwiGLU's two projections, which share what is averaged over rows."""
    kept = without_averaged_axis(key, tuple(range(param.dim())))
    mesh, cut = param.device_mesh, cut_of(param)
    placements: list[Any] = [Replicate()] * mesh.ndim
    if cut is not None and cut.dim in kept:
        placements[cut.mesh_dim] = Shard(kept.index(cut.dim))
    halves = factor.chunk(len(names)) if 0 in kept else (factor,)
    named = {}
    for name, half in zip(names, halves, strict=False):
        shape = list(half.shape)
        for mesh_dim, each in enumerate(placements):
            if isinstance(each, Shard):
                shape[each.dim] *= mesh.size(mesh_dim)  # parts are equal
        named[name] = placed(half, mesh, placements, shape)
    return named
