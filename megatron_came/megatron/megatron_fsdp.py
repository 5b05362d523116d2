"""CAME with ``--use-megatron-fsdp``, whose ranks hold rows of each parameter.

Megatron lays parameters one after the other into buffers, cuts these into one part for each
data-parallel rank, and hands over DTensors of what lies in this rank's part: rows, as many as it
happens to be, or none. CAME gets the plain tensors in them, with the place of their first row.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_came.core.shard import Shard
from megatron_came.megatron.checkpoints.digests.leaves import unwrapped
from megatron_came.megatron.checkpoints.digests.verifying import watched
from megatron_came.megatron.checkpoints.factors import FORMAT
from megatron_came.megatron.checkpoints.groups import own_settings_kept, without_params
from megatron_came.megatron.checkpoints.megatron_fsdp import sharded_state
from megatron_came.megatron.compat.distributed_optimizer import DistributedOptimizer
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.sharding import ModelGroups, adopt
from megatron_came.megatron.spikes import WithSpikeGuard
from megatron_came.optimizer import CAME
from megatron_came.voice import of_all_ranks


def local_groups(param_groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what this rank holds of each parameter in its place."""
    # Of to_local() it would be another tensor each time, with a history.
    return [
        {**group, "params": [param._local_tensor for param in group["params"]]}
        for group in param_groups
    ]


class CameMegatronFSDP(WithSpikeGuard, DistributedOptimizer):  # type: ignore[misc]
    """Megatron's ``DistributedOptimizer`` around :class:`megatron_came.CAME`, for Megatron-FSDP.

    Megatron-FSDP keeps main weights and gradients, and copies the weights to the model. The buffers
    are cut among the data-parallel group. The optimizer is of the groups that :func:`local_groups`
    returns, and None on a rank without any; to the arguments of ``DistributedOptimizer`` come the
    DTensors, by parameter group, and the process groups of the parameters' other shards.

    Raises:
        UnsupportedError: Megatron-FSDP and a parameter disagree on how tensor parallelism cuts it.
    """

    def __init__(
        self,
        optimizer: CAME | None,
        *args: Any,
        params: Sequence[Sequence[Tensor]],
        model_groups: ModelGroups,
        data_parallel_group: dist.ProcessGroup,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, *args, data_parallel_group=data_parallel_group, **kwargs)
        self._pairs: list[tuple[Any, Tensor]] = []
        if optimizer is None:
            return
        for own, here in zip(optimizer.param_groups, params, strict=True):
            self._pairs += zip(here, own["params"], strict=True)
        is_cut = self.ddp_config.data_parallel_sharding_strategy != "no_shard"
        group = data_parallel_group if is_cut else None  # else all ranks hold all
        whole = [(param.orig_param, local) for param, local in self._pairs]
        at = {
            param: {"start": start, "stop": start + local.numel(), "dp_group": group}
            for (param, local), start in zip(whole, _starts(self._pairs, group), strict=True)
        }
        adopt(optimizer, whole, model_groups, where=at.__getitem__)
        for param, local in self._pairs:
            _check_cut(param, optimizer.shard_of(local))

    def get_parameters(self) -> list[Tensor]:
        """The DTensors, which have the gradients that Megatron clips."""
        return [param for param, _ in self._pairs]

    def _copy_model_grads_to_main_grads(self) -> None:
        for param, local in self._pairs:
            local.grad = None if param.grad is None else param.grad._local_tensor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As Megatron's."""
        super().zero_grad(set_to_none)
        for _, local in self._pairs:
            local.grad = None

    def sharded_state_dict(
        self, model_sharded_state_dict: Any = None, is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Momentum and factors as DTensors, by key and name; to be saved, parameter groups too."""
        (chunk,) = unwrapped(self.model_chunks)
        state: dict[str, Any] = {
            "state": sharded_state(self.optimizer, self._pairs, chunk),
            "came": {"format": FORMAT, "parameters": {}},
        }
        if not is_loading:  # otherwise there are as many as there are in the checkpoint
            state["param_groups"] = without_params(self.optimizer.param_groups)
        return state

    def state_dict(self) -> Any:
        """Refuse, always: other formats than fsdp_dtensor have no place for it."""
        raise UnsupportedError(
            "--optimizer came with --use-megatron-fsdp saves its state in --ckpt-format "
            "fsdp_dtensor alone (sharded_state_dict): use that."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the settings of groups: the state has been filled in place."""
        own = self.optimizer.state_dict()
        kept = own_settings_kept(self.optimizer, state_dict["param_groups"])
        with kept as groups, watched(self.optimizer):
            own["param_groups"] = [
                {**group, "params": mine["params"]}
                for group, mine in zip(groups, own["param_groups"], strict=True)
            ]
            self.optimizer.load_state_dict(own)


def _starts(pairs: Sequence[tuple[Any, Tensor]], group: dist.ProcessGroup | None) -> list[int]:
    """Return the first element of each slice in its parameter; a collective."""
    if group is None:
        return [0] * len(pairs)
    counts = of_all_ranks([local.numel() for _, local in pairs], group)
    for (param, _), held in zip(pairs, map(sum, zip(*counts, strict=True)), strict=True):
        if held != param.orig_param.numel():
            raise UnsupportedError(
                f"--optimizer came: ranks hold {held} elements of a weight of shape "
                f"{tuple(param.orig_param.shape)} with --use-megatron-fsdp, not each of them once: "
                "use --use-distributed-optimizer alone."
            )
    # A slice begins behind those of the ranks before.
    return [sum(before) for before in zip([0] * len(pairs), *counts[: group.rank()], strict=True)]


def _check_cut(param: Any, shard: Shard) -> None:
    whole = list(shard.shape)
    if shard.tp_dim is not None:
        whole[shard.tp_dim] *= shard.tp_size
    if tuple(whole) != tuple(param.shape):
        raise UnsupportedError(
            f"--optimizer came: --use-megatron-fsdp takes a weight of shape {shard.shape} for a "
            f"shard of {tuple(param.shape)}, which the weight does not say (tensor_model_parallel, "
            "partition_dim): use layers that do, or --tensor-model-parallel-size 1."
        )
