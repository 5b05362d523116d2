"""From Megatron's optimizers and parameters to CAME's shards."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came import dtensors
from megatron_came.core.shard import ProcessGroup, Shard
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import Identity, identity_of, is_factored, own_settings
from megatron_came.optimizer import CAME


def chain_of(optimizer: Any) -> list[Any]:
    """Return Megatron's optimizers: those of its chain, or the one that there is."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """The process groups that matter to a parameter's statistics, beside data parallelism."""

    tp: dist.ProcessGroup  # tensor-parallel group of dense parameters
    expert_tp: dist.ProcessGroup  # and of expert parameters
    embedding: dist.ProcessGroup | None  # of copies of tied embeddings; None on stages without
    tp_dp: dist.ProcessGroup | None = None  # ``tp`` times the dense data-parallel group, as one

    @classmethod
    def of(cls, collection: Any | None) -> Self:
        """Take them from a ``ProcessGroupCollection``; None stands for Megatron's global groups."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        if collection is None or not hasattr(collection, "tp"):
            collection = ProcessGroupCollection.use_mpu_process_groups()
        return cls(
            tp=collection.tp,
            expert_tp=getattr(collection, "expt_tp", None) or collection.tp,
            embedding=getattr(collection, "embd", None),
            tp_dp=getattr(collection, "tp_dp_cp", None),
        )

    def tp_of(self, param: Tensor) -> dist.ProcessGroup:
        """The tensor-parallel group of a model parameter."""
        return self.tp if getattr(param, "allreduce", True) else self.expert_tp

    def tp_dp_of(self, param: Tensor, dp_group: ProcessGroup | None) -> dist.ProcessGroup | None:
        """The tensor-parallel group times ``dp_group`` as one group, if Megatron has one.

        It has none for experts, nor for one of several distributed-optimizer instances.
        """
        if dp_group is None or self.tp_dp is None or self.tp_of(param) is not self.tp:
            return None
        whole = self.tp_dp.size() == self.tp.size() * dp_group.size()
        return self.tp_dp if whole and getattr(param, "allreduce", True) else None


def shard_of(
    param: Tensor,
    groups: ModelGroups,
    *,
    start: int = 0,
    stop: int | None = None,
    dp_group: ProcessGroup | None = None,
    identity: Identity | None = None,
) -> Shard:
    """Describe a slice of a model parameter.

    Args:
        param: parameter of the model, with the attributes of
            ``megatron.core.tensor_parallel.set_tensor_model_parallel_attributes``.
        groups: where its other tensor-parallel shards and copies are.
        start: first flat element of the slice.
        stop: one past its last; None for the whole parameter.
        dp_group: ranks that hold the other slices.
        identity: of the parameter, where random bits depend on it.

    Raises:
        UnsupportedError: the parameter is sharded, but along a dimension that it does not say.
    """
    sharded = getattr(param, "tensor_model_parallel", False)
    tp_dim = getattr(param, "partition_dim", -1) if sharded else None
    if tp_dim is not None and not 0 <= tp_dim < max(param.dim(), 1):
        raise UnsupportedError(
            f"--optimizer came: a tensor-parallel weight of shape {tuple(param.shape)} does not "
            "say along which dimension it is cut (partition_dim); use layers that do, or "
            "--tensor-model-parallel-size 1."
        )
    if dtensors.is_dtensor(param):  # FSDP2's: rows of the local tensor, by data-parallel rank
        rows = dtensors.shard_of(param)
        start, stop, dp_group = rows.start, rows.stop, rows.dp_group
    tp_group = groups.tp_of(param)
    tp_rank, tp_parts = 0, 1
    if identity and not identity.is_local and tp_dim is not None and tp_group.size() > 1:
        tp_rank, tp_parts = tp_group.rank(), len(identity.offsets)
    return Shard(
        shape=tuple(param.shape),
        start=start,
        stop=param.numel() if stop is None else stop,
        tp_dim=tp_dim,
        tp_group=tp_group,
        tp_rank=tp_rank,
        tp_parts=tp_parts,
        dp_group=dp_group,
        tp_dp_group=groups.tp_dp_of(param, dp_group),
        copies_group=groups.embedding if getattr(param, "shared_embedding", False) else None,
        factored=is_factored(param),
    )


def adopt(
    came: CAME,
    pairs: Collection[tuple[Tensor, Tensor]],
    groups: ModelGroups,
    identities: dict[Tensor, Identity] | None = None,
    where: Callable[[Tensor], Mapping[str, Any]] = lambda param: {},
) -> None:
    """Tell an optimizer where what it updates lies and what settings it has; create its state.

    Pairs are the model's parameters, each with what the optimizer updates of it. Their identities
    are given where the rounding of momentum depends on these; ``where`` returns of a parameter what
    :func:`shard_of` takes to describe the slice.
    """
    at = {}
    if identities is not None:
        at = {param: identity_of(param, identities, groups.tp_of(param)) for param, _ in pairs}
    shards = {
        local: shard_of(param, groups, identity=at.get(param), **where(param))
        for param, local in pairs
    }
    names = {local: at[param].name for param, local in pairs} if at else None
    came.set_shards(shards, names, {local: own_settings(param) for param, local in pairs})
    came.init_state()


@torch.no_grad()
def check_replicas(params: Iterable[Tensor], groups: ModelGroups) -> None:
    """Make sure that parameters said to be whole on every tensor-parallel rank are equal there.

    A layer that cuts its weight without saying so would otherwise get statistics of its own on
    every rank.

    Raises:
        UnsupportedError: a parameter differs.
    """
    whole = [param for param in params if not getattr(param, "tensor_model_parallel", False)]
    differing: list[Tensor] = []
    for group in dict.fromkeys((groups.tp, groups.expert_tp)):
        here = [param for param in whole if groups.tp_of(param) is group]
        if group.size() > 1 and here:
            values = (dtensors.local_of(param).detach().double() for param in here)
            # Two sums of a weight stand for it: others have them alike by chance alone.
            prints = torch.stack([torch.stack([v.sum(), v.square().sum()]) for v in values])
            # The greatest is the least where all ranks have the same, in one collective.
            extremes = torch.stack([prints, -prints])
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            differs = (extremes[0] != -extremes[1]).any(dim=1)
            differing += [here[index] for index in differs.nonzero().flatten().tolist()]
    if differing:
        raise UnsupportedError(
            f"--optimizer came: a weight of shape {tuple(differing[0].shape)} differs between "
            "tensor-parallel ranks but does not say that it is cut (tensor_model_parallel, "
            "partition_dim); use layers that do, or --tensor-model-parallel-size 1."
        )
