"""Parameters that are ``DTensor``: where they lie in their full tensors, and their state.

What a rank holds follows from device mesh and placements. Of the mesh dimensions that cut a
parameter, one may cut the first dimension anywhere: the local tensor is a flat range then, as a
ZeRO-1 optimizer's slice is. One more may cut any dimension into equal parts before it, as tensor
parallelism does. Ranks along dimensions that replicate hold the same slice with the same gradient.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from megatron_came.core.momentum import MOMENTUM, SCALE, momentum_of
from megatron_came.core.shard import ProcessGroup, Shard
from megatron_came.core.state import FACTORS, without_averaged_axis

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_REFUSED = (
    "CAME: a parameter of shape {shape} with placements {placements} on a mesh of {mesh} cannot be "
    "updated exactly: {why}."
)
_CUTS = (
    "of the mesh dimensions that cut it, one may cut dimension 0 and one more any dimension into "
    "equal parts; replicate it along the others"
)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``."""
    # Whoever has made one has loaded this module, which takes long to load.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: a plain tensor on the same memory."""
    if not is_dtensor(tensor):
        return tensor
    local: Any = tensor._local_tensor
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_gradient(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return what this rank holds of a gradient, laid out like its parameter.

    Tensor parallelism leaves gradients that are sums over ranks yet to be made (Partial).

    Raises:
        ValueError: the gradient of a ``DTensor`` is none, or lies on another mesh.
    """
    if grad is None or not is_dtensor(param):
        return grad
    if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"CAME: the gradient of a DTensor of shape {tuple(param.shape)} must be a DTensor on "
            "the parameter's mesh: leave it as backward() made it, or set decoupled_grad to one."
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_of(grad)


class _Cut(NamedTuple):
    """A mesh dimension that cuts a parameter, and where: the dimension that is cut."""

    mesh_dim: int
    dim: int


class _Cuts(NamedTuple):
    """The two cuts that a :class:`Shard` describes; the first into equal parts."""

    equal: _Cut | None
    flat: _Cut | None


def _cuts_of(param: DTensor) -> _Cuts:
    """Tell the cut into equal parts from the one of dimension 0 that may be uneven.

    Raises:
        ValueError: other placements.
    """
    mesh = param.device_mesh
    straight: list[_Cut] = []
    strided: list[tuple[_Cut, int]] = []
    if mesh.get_coordinate() is None:
        raise _refusal(param, "this rank is not in the mesh; give CAME the parameters of its own")
    for mesh_dim, placement in enumerate(param.placements):
        if mesh.size(mesh_dim) == 1 or placement.is_replicate():
            continue
        if type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise _refusal(param, "give it placements that are Shard or Replicate")
        cut = _Cut(mesh_dim, placement.dim % param.dim())  # type: ignore[attr-defined]
        if type(placement).__name__ == "_StridedShard":
            strided.append((cut, placement.split_factor))  # type: ignore[attr-defined]
        else:
            straight.append(cut)
    # FSDP2 marks its cut as strided where another has cut the same dimension before it.
    cuts = [*straight, *(cut for cut, _ in strided)]
    flat = next((cut for cut in reversed(cuts) if cut.dim == 0), None)
    others = [cut for cut in cuts if cut is not flat]
    if len(others) > 1:
        raise _refusal(param, _CUTS)
    equal = others[0] if others else None
    if equal is not None and param.shape[equal.dim] % mesh.size(equal.mesh_dim):
        raise _refusal(
            param, f"cut dimension {equal.dim} into equal parts, or only dimension 0, by one cut"
        )
    _check_order(param, _Cuts(equal, flat), strided)
    return _Cuts(equal, flat)


def _check_order(param: DTensor, cuts: _Cuts, strided: list[tuple[_Cut, int]]) -> None:
    """Refuse cuts of one dimension in another order than the placements tell."""
    before = {cut: 1 for cut in cuts if cut is not None}
    is_twice = len(before) == 2 and len({cut.dim for cut in before}) == 1
    if is_twice and cuts.flat is not None and cuts.equal is not None:
        before[cuts.flat] = param.device_mesh.size(cuts.equal.mesh_dim)
    is_known = all(factor == before[cut] for cut, factor in strided)
    if is_twice and not strided:  # newer PyTorch can cut from right to left without a mark
        order = getattr(param._spec, "shard_order", None) or ()
        is_known = all(list(dims) == sorted(dims) for _, dims in order)
    if not is_known:
        raise _refusal(param, "distribute it in the default order of mesh dimensions")


class _Bounds(NamedTuple):
    """Along one dimension, what this rank holds of a full tensor."""

    dim: int
    start: int
    length: int


def _bounds(param: DTensor, cut: _Cut, size: int) -> _Bounds:
    """Return which chunk of a dimension of some size this rank holds, as ``torch.chunk`` cuts."""
    ranks, rank = (
        param.device_mesh.size(cut.mesh_dim),
        param.device_mesh.get_local_rank(cut.mesh_dim),
    )
    chunk = -(-size // ranks)
    start = min(rank * chunk, size)
    return _Bounds(cut.dim, start, min(chunk, size - start))


def shard_of(param: DTensor) -> Shard:
    """Describe this rank's slice of a parameter.

    Raises:
        ValueError: it is cut in a way that a shard cannot describe.
    """
    mesh, (equal, flat) = param.device_mesh, _cuts_of(param)
    shape = list(param.shape)
    tp_group: ProcessGroup | None = None
    tp_rank = 0
    if equal is not None:
        shape[equal.dim] //= mesh.size(equal.mesh_dim)
        tp_group, tp_rank = mesh.get_group(equal.mesh_dim), mesh.get_local_rank(equal.mesh_dim)
    found, start = list(shape), 0
    if flat is not None:
        bounds = _bounds(param, flat, shape[0])
        found[0], start = bounds.length, bounds.start * math.prod(shape[1:])
    if list(local_of(param).shape) != found:
        raise _refusal(
            param,
            f"this rank holds {tuple(local_of(param).shape)} of it where the placements say "
            f"{tuple(found)}; distribute it with fully_shard or distribute_tensor",
        )
    return Shard(
        shape=tuple(shape),
        start=start,
        stop=start + math.prod(found),
        tp_dim=None if equal is None else equal.dim,
        tp_group=tp_group,
        tp_rank=tp_rank,
        dp_group=None if flat is None else mesh.get_group(flat.mesh_dim),
    )


def check(params: Iterable[Tensor], named: Iterable[Tensor], flat_convolutions: bool) -> None:
    """Refuse parameters that cannot be updated exactly.

    Args:
        params: all that have no shard of their own.
        named: those of which a shard says where they lie.
        flat_convolutions: as of :class:`megatron_came.CAME`.

    Raises:
        ValueError: there is one.
    """
    for param in named:
        if is_dtensor(param):
            raise _refusal(param, "it has a shard too; leave it out of shards")
    for param in params:
        if is_dtensor(param):
            if flat_convolutions and param.dim() > 2:
                raise _refusal(param, "flat_convolutions goes with plain tensors; leave it out")
            shard_of(param)


def _refusal(param: DTensor, why: str) -> ValueError:
    shape, mesh = tuple(param.shape), tuple(param.device_mesh.shape)
    return ValueError(
        _REFUSED.format(shape=shape, placements=tuple(param.placements), mesh=mesh, why=why)
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
    """Return state that other meshes can load: momentum in bf16, not in int8."""
    if SCALE not in state:
        return state
    momentum = momentum_of(state_here(state))
    others = {key: value for key, value in state.items() if key != SCALE}
    return {
        **others,
        MOMENTUM: _wrapped(param, MOMENTUM, momentum) if is_dtensor(param) else momentum,
    }


def laid_out(param: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay loaded state out as that of a parameter, from whole tensors or any mesh."""
    if not is_dtensor(param):
        return {key: _whole(value) for key, value in saved.items()}
    if SCALE in saved:  # of other blocks
        saved = {MOMENTUM: momentum_of(saved), **{k: v for k, v in saved.items() if k != MOMENTUM}}
        del saved[SCALE]
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
    equal, _ = _cuts_of(param)
    kept = _kept(param, key)
    if equal is not None and equal.dim in kept:
        placements[equal.mesh_dim] = Shard(kept.index(equal.dim))
    return placements


def _wrapped(param: DTensor, key: str, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size(param.shape[dim] for dim in _kept(param, key))
    stride = torch.empty(shape, device="meta").stride()
    placements = _placements(param, key)
    return DTensor.from_local(
        value, param.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


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
    value = _whole(value).to(param.device)
    equal, flat = _cuts_of(param)
    kept, size = _kept(param, key), param.shape[0] if param.dim() else 0
    if equal is not None:
        bounds = _bounds(param, equal, param.shape[equal.dim])
        size = bounds.length if equal.dim == 0 else size
        if equal.dim in kept:
            value = value.narrow(kept.index(equal.dim), bounds.start, bounds.length)
    if flat is not None and key not in FACTORS:
        value = value.narrow(*_bounds(param, flat, size))
    return _wrapped(param, key, value.clone(memory_format=torch.contiguous_format))
