"""Checkpoints with ``--use-torch-fsdp2``, whose parameters are DTensors cut by rows.

Megatron saves the rows that each data-parallel rank holds. Factors are whole on all of these ranks,
so they are saved as with plain data parallelism.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_came.core.momentum import MOMENTUM
from megatron_came.dtensors import is_dtensor, local_of, shard_of, state_like
from megatron_came.patching import Function

# Whether it is CAME whose parameters Megatron looks for.
_is_came: ContextVar[bool] = ContextVar("is_came", default=False)


@contextlib.contextmanager
def parameters_found() -> Iterator[None]:
    """Let Megatron find an optimizer's parameters in the model's sharded state.

    That state has FSDP2's local tensors; newer PyTorch hands out another object for one each time
    that it is asked. Of other optimizers nothing is found then, and that is as well: Megatron would
    not load the number of their steps.
    """
    token = _is_came.set(True)
    try:
        yield
    finally:
        _is_came.reset(token)


def by_local_tensor(original: Function, optim_params_iter: Iterable[Tensor]) -> Any:
    """Stand in for what numbers an optimizer's parameters: see :func:`parameters_found`."""
    params = map(local_of, optim_params_iter) if _is_came.get() else optim_params_iter
    return original(params)


def like(param: Tensor, rows: Tensor) -> Tensor:
    """Return what was loaded of a tensor that lies as a parameter does: a DTensor for one."""
    return state_like(param, {MOMENTUM: local_of(rows)})[MOMENTUM]


def whole_leaves(
    leaves: Sequence[ShardedTensor], param: Tensor, *, is_stacked: bool
) -> tuple[Sequence[ShardedTensor], Tensor]:
    """Describe what all data-parallel ranks together hold of a parameter.

    Args:
        leaves: what this rank holds of it, as the model's sharded state has it.
        param: the parameter.
        is_stacked: whether it consists of SwiGLU's two projections, each of which tensor
            parallelism cuts by itself.

    Returns:
        Leaves as with plain data parallelism, and the tensor in which they lie, which has no
        values where this rank does not hold it.

    Raises:
        ValueError: Megatron saves it in a way that is not known.
    """
    if not is_dtensor(param) or shard_of(param).dp_group is None:
        return leaves, local_of(param)
    whole, leaf = torch.empty(param.shape, dtype=param.dtype, device="meta"), leaves[0]
    parts = whole.chunk(2) if is_stacked else (whole,)
    axis, rows, size = leaf.prepend_axis_num, leaf.local_shape[0], len(parts[0])
    first = shard_of(param).start // max(whole[0].numel(), 1)  # row
    part, inside = divmod(first, size)
    cuts = leaf.axis_fragmentations[axis] * rows // len(whole)  # by tensor parallelism
    # In a file rows go by projection, then by tensor-parallel rank, then by data-parallel rank.
    rank = (leaf.global_offset[axis] - inside) // size - part * cuts
    offsets = [(number * cuts + rank) * size for number in range(len(parts))]
    total = leaf.global_shape[axis], leaf.global_offset[axis]
    if len(leaves) > 1 or total != (cuts * len(whole), offsets[part] + inside):
        raise ValueError(
            f"--optimizer came: {leaf.key} of shape {tuple(param.shape)} is cut by "
            "--use-torch-fsdp2 in a way that its factors cannot follow: leave that out, or use "
            "--optimizer adam."
        )

    def at(dims: Sequence[int], value: int) -> tuple[int, ...]:
        return (*dims[:axis], value, *dims[axis + 1 :])

    return [
        replace(
            leaf,
            data=values,
            local_shape=tuple(values.shape),
            global_offset=at(leaf.global_offset, offset),
            axis_fragmentations=at(leaf.axis_fragmentations, cuts * len(parts)),
            replica_id=(*leaf.replica_id[:-1], first // rows),  # data-parallel ranks hold the same
        )
        for values, offset in zip(parts, offsets, strict=True)
    ], whole
