"""CAME on Megatron's ZeRO-1 distributed optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came.host.factor_checkpoints import (
    FORMAT,
    load_factors,
    sharded_factors,
    unknown_format,
)
from megatron_came.host.releases.distributed_optimizer import DistributedOptimizer
from megatron_came.host.resumed_settings import own_settings_kept
from megatron_came.host.sharding import ModelGroups, shard_of
from megatron_came.layout import Shard
from megatron_came.optimizer import CAME
from megatron_came.state import FACTORS


class CameDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Megatron's ``DistributedOptimizer`` around :class:`megatron_came.CAME`.

    Momentum and main weights are sharded over the data-parallel group as Adam's are. Factors are
    whole on every rank of it, so that each rank knows every parameter: where its slice of one is
    empty, an empty tensor stands for it at the end of the parameter group.

    Checkpoints hold the momentum where Adam's would be, and the factors under ``came``: in
    distributed checkpoints by the names of the parameters, in legacy ones by their order.
    """

    def __init__(
        self, optimizer: CAME | None, *args: Any, model_groups: ModelGroups, **kwargs: Any
    ) -> None:
        model_params = (
            [list(group["params"]) for group in optimizer.param_groups] if optimizer else []
        )
        super().__init__(optimizer, *args, **kwargs)
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._owned: dict[Tensor, Tensor] = {}
        if self.is_stub_optimizer:
            return
        for whole_groups, part_groups in (
            (self.model_fp32_groups, self.shard_fp32_groups),
            (self.model_float16_groups, self.shard_fp32_from_float16_groups),
        ):
            for params, parts in zip(whole_groups, part_groups, strict=True):
                self._owned.update(zip(params, parts, strict=True))
        shards: dict[Tensor, Shard] = {}
        for group, params in zip(self.optimizer.param_groups, model_params, strict=True):
            for param in params:
                part, shard = self._part_of(param, model_groups)
                if not shard.numel:
                    group["params"].append(part)
                shards[part] = shard
                self._parts.append((param, part))
        self.optimizer.set_shards(shards)
        self.optimizer.init_state()

    def _part_of(self, param: Tensor, model_groups: ModelGroups) -> tuple[Tensor, Shard]:
        """Return what the optimizer updates of a parameter on this rank, and where it lies."""
        dp_group = self.data_parallel_group
        if param not in self._owned:
            empty = torch.empty(0, dtype=torch.float32, device=param.device)
            return empty, shard_of(param, model_groups, stop=0, dp_group=dp_group)
        span = self._get_model_param_range_map(param)["param"]
        shard = shard_of(param, model_groups, start=span.start, stop=span.end, dp_group=dp_group)
        return self._owned[param], shard

    # Megatron's fused kernels for norms and loss scales do not all bear tensors without elements.

    def get_parameters(self) -> list[Tensor]:
        """The slices that have elements."""
        return [part for part in super().get_parameters() if part.numel()]

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        return [part.grad.data for part in self.get_parameters() if part.grad is not None]

    # What Megatron's checkpoint code asks of an optimizer other than Adam.

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """State that is sharded like the main weights."""
        return ("exp_avg",)

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        part = self._owned[model_param]
        return {"param": part, "exp_avg": self.optimizer.state[part]["exp_avg"]}

    def _set_main_param_and_optimizer_states(
        self, model_param: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        for key, tensor in self._get_main_param_and_optimizer_states(model_param).items():
            tensor.detach().copy_(tensors[key])

    def state_dict(self) -> dict[str, Any]:
        """Parameter groups without parameters, and the loss scale."""
        groups = self.optimizer.state_dict()["param_groups"]
        state: dict[str, Any] = {
            "optimizer": {
                "param_groups": [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in groups
                ]
            }
        }
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    # Distributed checkpoints.

    def sharded_state_dict(
        self, model_sharded_state_dict: Any = None, is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As Megatron's, with the factors under ``came``."""
        model_state = model_sharded_state_dict or {}
        state: dict[str, Any] = super().sharded_state_dict(model_state, is_loading, **kwargs)
        state["came"] = sharded_factors(self.optimizer, self._parts, model_state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Megatron's, with the factors."""
        factors = state_dict.pop("came", None)
        with own_settings_kept(self.optimizer):
            super().load_state_dict(state_dict)
        if factors is not None:
            load_factors(self.optimizer, self._parts, factors)

    def get_parameter_state_dp_reshardable(self) -> dict[Any, Any]:
        """As Megatron's, which stops at a bucket of which this rank holds padding alone."""
        state: dict[Any, Any] = super().get_parameter_state_dp_reshardable()
        for index, ranges in enumerate(self.gbuf_ranges):
            for dtype in ranges:
                for bucket, pieces in enumerate(state[index][dtype]):
                    if not pieces:
                        pieces.append(self._padding_piece(self.buffers[index].buckets[bucket]))
        return state

    def _padding_piece(self, bucket: Any) -> dict[str, Any]:
        """Stand for what of the checkpoint lies in this rank's padding of a bucket, if any does."""
        local = bucket.grad_data.numel() // self.data_parallel_group.size()
        first = self.data_parallel_group.rank() * local
        # Negative where all of this rank's part lies beyond the end.
        inside = min(local, bucket.numel_unpadded - first)
        start = min(0, inside)
        size = inside - start
        zeros = {key: torch.zeros(size, dtype=torch.float32) for key in ("param", "exp_avg")}
        return {**zeros, "gbuf_local_start": start, "gbuf_local_end": inside, "padding": True}

    # Legacy checkpoints: one file a model-parallel rank, gathered to and scattered from
    # data-parallel rank 0.

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, with the factors; a chain of optimizers saves what this returns."""
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is not None:
            state["came"] = {"format": FORMAT, "parameters": self._legacy_factors()}
        return state

    def load_parameter_state_from_dp_zero(self, state_dict: Any, **kwargs: Any) -> None:
        """Load what :meth:`get_parameter_state_dp_zero` returned.

        Raises:
            SystemExit: on all ranks, if the file holds no factors, or others.
        """
        group = self.data_parallel_group_gloo
        problem = [self._legacy_problem(state_dict) if group.rank() == 0 else None]
        dist.broadcast_object_list(problem, group=group, group_src=0)
        if problem[0]:
            raise SystemExit(f"megatron_came: {problem[0]}")
        super().load_parameter_state_from_dp_zero(state_dict, **kwargs)
        for position, factors in enumerate(self._legacy_factors()):
            for key, mine in factors.items():
                if group.rank() == 0:
                    mine.copy_(state_dict["came"]["parameters"][position][key])
                dist.broadcast(mine, group=group, group_src=0)
                self.optimizer.state[self._parts[position][1]][key].copy_(mine)

    def _legacy_factors(self) -> list[dict[str, Tensor]]:
        """Copy the factors to the CPU, by parameter."""
        return [
            {key: state[key].detach().to("cpu", copy=True) for key in FACTORS if key in state}
            for state in (self.optimizer.state[part] for _, part in self._parts)
        ]

    def _legacy_problem(self, state_dict: Any) -> str | None:
        """Say in one sentence why the factors of a legacy file do not fit, or None."""
        saved = state_dict.get("came")
        if saved is None:
            return (
                "the checkpoint holds no factors of CAME: another optimizer has written it. Give "
                "--no-load-optim or --finetune to start CAME afresh from its weights."
            )
        if saved.get("format") != FORMAT:
            return unknown_format(saved.get("format"))
        shapes = [
            [{key: tuple(value.shape) for key, value in factors.items()} for factors in parameters]
            for parameters in (saved["parameters"], self._legacy_factors())
        ]
        if shapes[0] != shapes[1]:
            return (
                "the checkpoint's factors of CAME belong to another model or tensor-parallel size: "
                "load it with the flags it was saved with, or give --no-load-optim."
            )
        return None
