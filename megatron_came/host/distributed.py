"""CAME on Megatron's ZeRO-1 distributed optimizer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_came.host.sharding import ModelGroups, shard_of
from megatron_came.layout import Shard
from megatron_came.optimizer import CAME


class CameDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Megatron's ``DistributedOptimizer`` around :class:`megatron_came.CAME`.

    Momentum and main weights are sharded over the data-parallel group as Adam's are. Factors are whole on every rank
    of it, so that each rank knows every parameter: where its slice of one is empty, an empty tensor stands for it at
    the end of the parameter group.
    """

    def __init__(self, optimizer: CAME | None, *args: Any, model_groups: ModelGroups, **kwargs: Any) -> None:
        model_params = [list(group["params"]) for group in optimizer.param_groups] if optimizer else []
        super().__init__(optimizer, *args, **kwargs)
        if self.is_stub_optimizer:
            return
        shards: dict[Tensor, Shard] = {}
        for group, params in zip(self.optimizer.param_groups, model_params, strict=True):
            for param in params:
                part, shard = self._part_of(param, model_groups)
                if not shard.numel:
                    group["params"].append(part)
                shards[part] = shard
        self.optimizer.set_shards(shards)

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """State that is sharded like the main weights."""
        return ("exp_avg",)

    def _part_of(self, param: Tensor, model_groups: ModelGroups) -> tuple[Tensor, Shard]:
        """Return what the optimizer updates of a model parameter on this rank, and where it lies."""
        if param not in self.model_param_gbuf_map:
            empty = torch.empty(0, dtype=torch.float32, device=param.device)
            return empty, shard_of(param, model_groups, stop=0, dp_group=self.data_parallel_group)
        group_index, order = self.model_param_group_index_map[param]
        part = self.optimizer.param_groups[group_index]["params"][order]
        span = self._get_model_param_range_map(param)["param"]
        shard = shard_of(
            param, model_groups, start=span.start, stop=span.end, dp_group=self.data_parallel_group
        )
        return part, shard
