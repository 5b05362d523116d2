"""Parameters that are ``DTensor``: where they lie in their full tensors, and their state.

What a rank holds follows from device mesh and placements. A mesh dimension that cuts a parameter
into equal parts is taken as tensor parallelism. What others cut of that part is a flat range, as a
ZeRO-1 optimizer's slice is, where they cut dimension 0 alone, and otherwise a window of the matrix.
Ranks along dimensions that replicate hold the same slice with the same gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, is_tensor

from megatron_came.core.hyperparameters import GROUP_KEYS
from megatron_came.core.momentum import MOMENTUM, SCALE
from megatron_came.core.saved import saved_momentum
from megatron_came.core.shard import Shard
from megatron_came.core.state import FACTORS, without_averaged_axis
from megatron_came.core.sums import largest
from megatron_came.voice import of_all_ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ORDER = "distribute it in the default order of mesh dimensions"


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``."""
    # Whoever has made one has loaded this module, which takes long to load.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: a plain tensor on the same memory."""
    if not is_dtensor(tensor):
        return tensor
    return _arrived(tensor._local_tensor)


def _arrived(tensor: Any) -> Tensor:
    """Wait for what a functional collective returns; it has no memory of its own."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor  # type: ignore[no-any-return]


def local_gradient(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return what this rank holds of a gradient, laid out like its parameter.

    Tensor parallelism leaves gradients that are sums over ranks yet to be made (Partial).

    Raises:
        ValueError: the gradient of a ``DTensor`` is none, or lies on another mesh; or that of
            another tensor is one.
    """
    if grad is None:
        return None
    if not is_dtensor(param):
        if is_dtensor(grad):
            raise ValueError(
                f"CAME: the gradient of a plain tensor of shape {tuple(param.shape)} is a DTensor: "
                "set it to the DTensor's full_tensor()."
            )
        return _arrived(grad)
    if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"CAME: the gradient of a DTensor of shape {tuple(param.shape)} must be a DTensor on "
            "the parameter's mesh: leave it as backward() made it, or set decoupled_grad to one."
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_of(grad)


class _Cut(NamedTuple):
    """A mesh dimension that cuts a parameter: which of its dimensions, into how many chunks."""

    mesh_dim: int
    dim: int
    chunks: int


def _cuts_of(param: DTensor) -> list[_Cut]:
    """Return the cuts in the order in which they were made.

    Raises:
        ValueError: placements of another kind, or cuts in an order that they do not tell.
    """
    mesh, order, marked = param.device_mesh, list[_Cut](), list[_Cut]()
    if mesh.get_coordinate() is None:
        raise _refusal(param, "this rank is not in the mesh; give CAME the parameters of its own")
    # From the last: fully_shard cuts after tensor parallelism, whose mesh dimension comes later,
    # and marks its cut as strided, by the number of chunks that there were before.
    for mesh_dim in reversed(range(mesh.ndim)):
        placement: Any = param.placements[mesh_dim]
        if mesh.size(mesh_dim) == 1 or placement.is_replicate():
            continue
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard") or not param.dim():
            raise _refusal(param, "give it placements that are Shard or Replicate")
        cut = _Cut(mesh_dim, placement.dim % param.dim(), mesh.size(mesh_dim))
        place, chunks = 0, placement.split_factor if kind == "_StridedShard" else 1
        while chunks > 1 and place < len(order):
            # Behind so many cuts of the same dimension as make up the mark's number of chunks.
            chunks /= order[place].chunks if order[place].dim == cut.dim else 1
            place += 1
        if chunks != 1:
            raise _refusal(param, _ORDER)
        order.insert(place, cut)
        marked += [cut] if place else []  # cut after another
    for cut in marked:
        before = order[: order.index(cut)]
        if param.shape[cut.dim] % math.prod(each.chunks for each in before if each.dim == cut.dim):
            # PyTorch itself does not know then which rows are where.
            raise _refusal(param, f"cut dimension {cut.dim} into equal parts before fully_shard")
    # Newer PyTorch can cut from right to left without a mark.
    shard_order = getattr(param._spec, "shard_order", None) or ()
    if not marked and any(list(dims) != sorted(dims) for _, dims in shard_order):
        raise _refusal(param, _ORDER)
    return order


def _equal_of(param: DTensor, cuts: list[_Cut]) -> _Cut | None:
    """Choose the cut along which factors are cut too, as by tensor parallelism, if there is one.

    It is the first of its dimension, into equal parts. What the others leave of the part is a flat
    range if they cut dimension 0 alone, so that kernels take it.
    """
    firsts = {cut.dim: cut for cut in reversed(cuts)}.values()  # of two the first stays
    equal = [cut for cut in firsts if param.shape[cut.dim] % cut.chunks == 0]
    if len(cuts) == 1:
        equal = [cut for cut in equal if cut.dim]  # rows alone: a flat range
    # Indices of matrices in a batch are to be one range: a cut in their midst comes first.
    return max(equal, key=lambda cut: (0 < cut.dim < param.dim() - 2, cut.dim > 0), default=None)


def _ranges(param: DTensor, cuts: Iterable[_Cut], *, of_first: bool = False) -> list[range]:
    """Return what cuts leave of each dimension, one after another as ``torch.chunk`` cuts.

    With ``of_first`` that is what the first rank has, whose chunks are the longest.
    """
    ranges = [range(size) for size in param.shape]
    for mesh_dim, dim, chunks in cuts:
        chunk = -(-len(ranges[dim]) // chunks)  # rounded up
        rank = 0 if of_first else param.device_mesh.get_local_rank(mesh_dim)
        ranges[dim] = ranges[dim][rank * chunk : (rank + 1) * chunk]
    return ranges


def shard_of(param: DTensor) -> Shard:
    """Describe this rank's slice of a parameter.

    Raises:
        ValueError: it is cut in a way that a shard cannot describe.
    """
    mesh, cuts = param.device_mesh, _cuts_of(param)
    equal = _equal_of(param, cuts)
    part, ranges = _ranges(param, [equal] if equal else []), _ranges(param, cuts)
    found = tuple(map(len, ranges))
    if local_of(param).shape != found:
        raise _refusal(
            param,
            f"this rank holds {tuple(local_of(param).shape)} of it where the placements say "
            f"{found}; distribute it with fully_shard or distribute_tensor",
        )
    ranges = [range(r.start - p.start, r.stop - p.start) for r, p in zip(ranges, part, strict=True)]
    shape = tuple(map(len, part))
    window = _window(param, cuts, ranges, shape)
    start = 0 if window or not shape else ranges[0].start * math.prod(shape[1:])
    groups = [mesh.get_group(cut.mesh_dim) for cut in cuts if cut is not equal]
    return Shard(
        shape=shape,
        start=start,
        stop=start + math.prod(found),
        tp_dim=equal.dim if equal else None,
        tp_group=mesh.get_group(equal.mesh_dim) if equal else None,
        tp_rank=mesh.get_local_rank(equal.mesh_dim) if equal else 0,
        dp_group=groups[0] if groups else None,
        more_groups=tuple(groups[1:]),
        window=window,
    )


def _window(
    param: DTensor, cuts: list[_Cut], ranges: list[range], shape: tuple[int, ...]
) -> tuple[slice, slice, slice] | None:
    """Return ranges of dimensions as ranges of (batch, rows, columns); None if they are flat.

    Raises:
        ValueError: the matrices are no range of the batch.
    """
    # Whole rows are flat. By the longest parts, so that all ranks find the same.
    lengths = [*map(len, _ranges(param, cuts, of_first=True))]
    if math.prod(lengths[1:]) == math.prod(shape[1:]):
        return None
    start, count, is_range = 0, 1, True
    for dim, size in enumerate(shape[:-2]):
        is_range &= count == 1 or lengths[dim] == size
        start, count = start * size + ranges[dim].start, count * lengths[dim]
    if not is_range:
        raise _refusal(param, "cut its dimensions before the last two once, into equal parts")
    batch = math.prod(map(len, ranges[:-2]))
    rows, columns = (slice(each.start, each.stop) for each in ranges[-2:])
    return slice(start, start + batch), rows, columns


def check(params: Iterable[Tensor], named: Mapping[Tensor, Shard], flat_convolutions: bool) -> None:
    """Refuse parameters that cannot be updated exactly.

    Of the named ones a shard says where they lie, as tensor parallelism has cut them.

    Raises:
        ValueError: there is one.
    """
    for param, shard in named.items():
        if is_dtensor(param) and _cut_of(shard) != _cut_of(shard_of(param)):
            raise _refusal(param, "it has a shard that says otherwise; leave it out of shards")
    for param in params:
        if is_dtensor(param):
            if flat_convolutions and param.dim() > 2:
                raise _refusal(param, "flat_convolutions goes with plain tensors; leave it out")
            shard_of(param)


def _cut_of(shard: Shard) -> tuple[object, ...]:
    """What mesh and placements say of a slice; tensor parallelism before them they do not know."""
    return shard.shape, shard.start, shard.stop, shard.dp_group, shard.more_groups, shard.window


def check_ranks(owners: Mapping[Tensor, object], groups: Iterable[Mapping[str, Any]]) -> None:
    """Compare what the ranks of each mesh were given, parameter groups too; a collective.

    Of each parameter that is what must be the same on all ranks that hold some of it.

    Raises:
        ValueError: ranks differ.
    """
    settings = {
        f"{key} of parameter group {index}": value.tolist() if is_tensor(value) else value
        for index, group in enumerate(groups)
        for key in ("lr", "weight_decay", "step", "maximize", *GROUP_KEYS)
        if (value := group.get(key)) is not None
    }
    meshes: dict[Any, dict[str, object]] = {}
    for param, given in owners.items():
        if is_dtensor(param):
            here = meshes.setdefault(param.device_mesh, dict(settings))
            # Its place among those of the mesh, which is the same on all of its ranks.
            here[f"parameter {len(here) - len(settings)} of its mesh"] = given
    for mesh, here in meshes.items():
        for mesh_dim in range(mesh.ndim):
            for rank, there in enumerate(of_all_ranks(here, mesh.get_group(mesh_dim))):
                for key in here.keys() | there.keys():
                    if here.get(key) != there.get(key):
                        raise ValueError(
                            f"CAME: {key} is {here.get(key)} on this rank, and {there.get(key)} "
                            f"on rank {rank} along dimension {mesh_dim} of its mesh: give all "
                            "ranks the same."
                        )


def agreed(values: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Return what all ranks of the parameters' meshes go on from, the largest; a collective.

    The values are equal but for rounding, or where what is no ``DTensor`` differs.
    """
    meshes = {p.device_mesh: local_of(p).device for p in params if is_dtensor(p)}
    for mesh, device in meshes.items():
        groups: Any = map(mesh.get_group, range(mesh.ndim))
        values = largest(values, groups, device)
    return values


def _refusal(param: DTensor, why: str) -> ValueError:
    return ValueError(
        f"CAME: a parameter of shape {tuple(param.shape)} with placements "
        f"{tuple(param.placements)} on a mesh of {tuple(param.device_mesh.shape)} cannot be "
        f"updated exactly: {why}."
    )


# State.


def state_like(param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state of this rank's slice into ``DTensor`` if the parameter is one.

    So ``torch.distributed.checkpoint`` saves it, and loads it on other meshes. Momentum is laid
    out like the parameter; factors are whole on every rank but along the cut into equal parts.
    The scales of int8 stay plain: they belong to blocks of this rank's slice.
    """
    if not is_dtensor(param):
        return state
    return {k: v if k == SCALE else _wrapped(param, k, v) for k, v in state.items()}


def state_here(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this rank holds of a parameter's state."""
    return {key: local_of(value) for key, value in state.items()}


def portable(param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return state that other meshes can load: momentum in bf16, of a plain one on the CPU."""
    if SCALE not in state:
        return state
    momentum = saved_momentum(state_here(state))
    if is_dtensor(param):
        momentum = _wrapped(param, MOMENTUM, momentum.to(param.device))
    return _in_floats(state, momentum)


def _in_floats(state: Mapping[str, Tensor], momentum: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != SCALE} | {MOMENTUM: momentum}


def laid_out(param: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay loaded state out as that of a parameter, from whole tensors or any mesh."""
    if not is_dtensor(param):
        return {key: _whole(value) for key, value in saved.items()}
    if SCALE in saved:  # of other blocks
        saved = _in_floats(saved, saved_momentum(saved))
    return {key: _cut(param, key, value) for key, value in saved.items()}


def _kept(param: DTensor, key: str) -> tuple[int, ...]:
    """The dimensions of a parameter that a tensor of its state has."""
    dims = tuple(range(param.dim()))
    return without_averaged_axis(key, dims) if key in FACTORS else dims


def _placements(param: DTensor, key: str) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    if key not in FACTORS:
        return list(param.placements)
    placements: list[Any] = [Replicate()] * len(param.placements)
    equal = _equal_of(param, _cuts_of(param))
    kept = _kept(param, key)
    if equal is not None and equal.dim in kept:
        placements[equal.mesh_dim] = Shard(kept.index(equal.dim))
    return placements


def _wrapped(param: DTensor, key: str, value: Tensor) -> Tensor:
    shape = [param.shape[dim] for dim in _kept(param, key)]
    return placed(value, param.device_mesh, _placements(param, key), shape)


def placed(local: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> DTensor:
    """Make a ``DTensor`` of what this rank holds of a tensor of this shape."""
    from torch.distributed.tensor import DTensor

    # Given, since from_local takes all parts for as large as this one.
    size, stride = torch.Size(shape), torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


def _whole(value: Tensor) -> Tensor:
    if not is_dtensor(value):
        return value
    # Gloo does not gather int16.
    dtype = torch.int32 if value.dtype == torch.int16 else value.dtype
    whole: Tensor = value.to(dtype).full_tensor()  # type: ignore[attr-defined]
    return whole.to(value.dtype)


def _cut(param: DTensor, key: str, value: Tensor) -> Tensor:
    if is_dtensor(value):
        wanted = tuple(_placements(param, key))
        if value.device_mesh == param.device_mesh and tuple(value.placements) == wanted:
            return value
    value = _whole(value).to(param.device)  # a collective, if it is of another mesh
    kept, cuts = _kept(param, key), _cuts_of(param)
    equal = _equal_of(param, cuts)
    if key in FACTORS:
        cuts = [equal] if equal else []
    ranges = _ranges(param, cuts)
    for index, dim in enumerate(kept):
        value = value.narrow(index, ranges[dim].start, len(ranges[dim]))
    return _wrapped(param, key, value.clone(memory_format=torch.contiguous_format))
