"""CAME on Megatron's ZeRO-1 distributed optimizer."""

import copy
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came.core.parameter_slice import gradient_of
from megatron_came.core.saved import (
    copied_weights,
    saved_momentum,
    saved_weights,
    set_momentum,
    set_weights,
)
from megatron_came.core.state import FACTORS, REMAINDER
from megatron_came.megatron.checkpoints import buckets
from megatron_came.megatron.checkpoints.contents import damaged, factors_problem
from megatron_came.megatron.checkpoints.digests.verifying import note_slice, watched
from megatron_came.megatron.checkpoints.factors import FORMAT, load_factors, sharded_factors
from megatron_came.megatron.checkpoints.groups import own_settings_kept, without_params
from megatron_came.megatron.compat.distributed_optimizer import (
    PRECISION_AWARE,
    DistributedOptimizer,
    precision_aware,
)
from megatron_came.megatron.cpu_offload import HostSlice, Offloaded, chosen, on_host_of
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import Identity
from megatron_came.megatron.sharding import ModelGroups, adopt
from megatron_came.megatron.spikes import WithSpikeGuard
from megatron_came.optimizer import CAME
from megatron_came.step import are_same
from megatron_came.voice import stop


class CameDistributedOptimizer(WithSpikeGuard, Offloaded, DistributedOptimizer):  # type: ignore[misc]
    """Megatron's ``DistributedOptimizer`` around :class:`megatron_came.CAME`.

    Momentum and main weights are sharded over the data-parallel group as Adam's are. Factors are
    whole on every rank of it, so that each rank knows every parameter: where its slice of one is
    empty, an empty tensor stands for it at the end of the parameter group.

    Of a bf16 model, gradients are read where they were reduced, and the step writes the model's
    weights itself. 16-bit gradients are copied to fp32 where there is a loss scale, which PyTorch
    does not divide bf16 by on a GPU, and where others in the chain of optimizers are in fp32: fused
    kernels for norms take one dtype. With ``--fp8-param-gather`` Megatron writes all weights.

    Checkpoints hold the main weights in fp32 and the momentum, in fp32 or bf16, where Adam's would
    be, and the factors under ``came``: in distributed checkpoints by the names of the parameters,
    in legacy ones by their order.

    To the arguments of ``DistributedOptimizer`` come the process groups of the parameters' other
    shards and, where the rounding of momentum depends on these, the parameters' identities. The
    optimizer is None on a rank without parameter groups.
    """

    copies_gradients = False  # 16-bit ones to fp32, even without a loss scale

    def __init__(
        self,
        optimizer: CAME | None,
        config: Any,
        *args: Any,
        model_groups: ModelGroups,
        identities: dict[Tensor, Identity] | None = None,
        **kwargs: Any,
    ) -> None:
        model_params = (
            [list(group["params"]) for group in optimizer.param_groups] if optimizer else []
        )
        has_remainders = config.main_params == "remainder"
        config = copy.copy(config)
        # While Megatron builds, this decides whether its groups hold the 16-bit weights or fp32
        # copies; afterwards, whether gradients are to be found in ``decoupled_grad``. fp16 ones are
        # copied: dividing by the loss scale takes fp32. In ``grad`` none may be of another device.
        setattr(config, PRECISION_AWARE, config.bf16 or config.optimizer_cpu_offload)
        with precision_aware(config, has_remainders or config.optimizer_cpu_offload):
            super().__init__(optimizer, config, *args, **kwargs)
        self._is_loading, self._pairs = False, []
        self._owned: dict[Any, Any] = {}  # tensors, with attributes of Megatron's
        self._whole_grads: list[Tensor] = []
        self._grads: list[Tensor] = []  # slices of them
        if self.is_stub_optimizer:
            return
        moved = chosen(config, self.model_chunks, chain(*model_params), model_groups)
        mains = self.shard_fp32_from_float16_groups
        if config.optimizer_cpu_offload and not has_remainders:
            self._make_main_weights(moved)
        of_float16 = self.shard_float16_groups if has_remainders else mains
        whole = chain(*self.model_fp32_groups, *self.model_float16_groups)
        here = chain(*self.shard_fp32_groups, *of_float16)
        self._owned.update(zip(whole, here, strict=True))
        on_host: dict[Tensor, HostSlice] = {}
        for group, params in zip(self.optimizer.param_groups, model_params, strict=True):
            for param in params:
                start, stop = self._range_of(param)
                empty = torch.empty(0, dtype=torch.float32, device=param.device)
                local = self._owned.get(param, empty)
                if start == stop:  # Megatron has left it out of the group
                    group["params"].append(local)
                if param in moved:
                    weight = param.detach().view(-1)[start:stop]
                    dtype = local.dtype if has_remainders else torch.float32
                    on_host[local] = HostSlice.move(local, weight, dtype, config)
                self._pairs.append((param, local))
        if config.optimizer_cpu_offload:
            self.optimizer.keep_on_host(on_host)
        adopt(self.optimizer, self._pairs, model_groups, identities, self._where)
        if self._in_place and not (has_remainders or self.ddp_config.fp8_param_gather):
            weights = zip(chain(*mains), chain(*self.shard_float16_groups), strict=True)
            self.optimizer.set_model_weights(dict(weights))

    def _make_main_weights(self, moved: Collection[Tensor]) -> None:
        """Make fp32 main weights of 16-bit weights on the device; of those that move, no copies.

        Megatron would copy all before some move, which may be more than the device holds.
        """
        for group, params, shards, mains in zip(
            self.optimizer.param_groups,
            self.model_float16_groups,
            self.shard_float16_groups,
            self.shard_fp32_from_float16_groups,
            strict=True,
        ):
            for index, (param, shard) in enumerate(zip(params, shards, strict=True)):
                # Of what moves the 16-bit weights stand in until :meth:`HostSlice.move`.
                main = shard.detach() if param in moved else shard.float()
                vars(main).update(vars(shard))  # attributes of Megatron's
                param.main_param = mains[index] = main
            # They are the last in their group.
            group["params"][len(group["params"]) - len(mains) :] = mains

    def _where(self, param: Tensor) -> dict[str, Any]:
        start, stop = self._range_of(param)
        return {"start": start, "stop": stop, "dp_group": self.data_parallel_group}

    def _range_of(self, param: Tensor) -> tuple[int, int]:
        """First and last element + 1 of the slice of a parameter that this rank owns."""
        if param not in self._owned:
            return 0, 0
        here = self._get_model_param_range_map(param)["param"]
        return here.start, here.end

    # Gradients that are read, and weights that are written, where Megatron's buffers hold them.

    @property
    def _in_place(self) -> bool:
        return bool(getattr(self.config, PRECISION_AWARE))

    def _copy_main_params_to_model_params(self) -> None:
        # Megatron writes weights that it quantises, on all ranks together.
        written = self._in_place and not self.ddp_config.fp8_param_gather
        with precision_aware(self.config, written):
            super()._copy_main_params_to_model_params()

    def _copy_model_grads_to_main_grads(self) -> None:
        if not self._in_place or self.is_stub_optimizer:
            super()._copy_model_grads_to_main_grads()
            return
        whole = [param.main_grad for param in self._owned]
        # Slices are views, which take long to make and last as long as what they are of.
        if not are_same(whole, self._whole_grads):
            ranges = map(self._range_of, self._owned)
            self._grads = [
                grad.view(-1)[start:stop] for grad, (start, stop) in zip(whole, ranges, strict=True)
            ]
            self._whole_grads = whole
        in_fp32 = self.copies_gradients or self.grad_scaler is not None
        for local, grad in zip(self._owned.values(), self._grads, strict=True):
            local.decoupled_grad = grad.float() if in_fp32 else grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As Megatron's."""
        super().zero_grad(set_to_none)
        if not self.is_stub_optimizer:
            for local in self._owned.values():
                local.decoupled_grad = None

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        if self.is_stub_optimizer:
            return
        if self.config.main_params == "remainder":
            if state_dict is not None:  # Megatron-Bridge's load_main_params_from_ckpt
                raise UnsupportedError(
                    "--came-main-params remainder does not go with main weights that are loaded "
                    "from a checkpoint of the model's: leave load_main_params_from_ckpt out."
                )
            for state in self.optimizer.state.values():
                if REMAINDER in state:
                    state[REMAINDER].zero_()  # main weights are then the bf16 weights
            for local, slice_ in on_host_of(self.optimizer).items():
                slice_.fetch(local)
            return
        with precision_aware(self.config, False):
            super()._copy_model_params_to_main_params(state_dict)

    # Megatron's fused kernels for norms and loss scales do not all take tensors without elements.

    def get_parameters(self) -> list[Tensor]:
        """The slices that have elements."""
        return [local for local in super().get_parameters() if local.numel()]

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        grads = [gradient_of(local) for local in self.get_parameters()]
        return [grad.data for grad in grads if grad is not None]

    # What Megatron's checkpoint code asks of an optimizer other than Adam.

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """State that is sharded like the main weights."""
        return ("exp_avg",)

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        local = self._owned[model_param]
        state = self.optimizer.state[local]
        # An fp32 model's own weights are read into the tensors themselves, and looked at.
        is_copied = self._is_loading and model_param.dtype == torch.float32
        return {
            "param": (copied_weights if is_copied else saved_weights)(local, state),
            # Asked for in fp32 when it is loaded, whatever it was saved in.
            "exp_avg": saved_momentum(state, torch.float32 if self._is_loading else None),
        }

    def _set_main_param_and_optimizer_states(
        self, model_param: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        note_slice(self, model_param, tensors)
        local = self._owned[model_param]
        state = self.optimizer.state[local]
        set_weights(local, state, tensors["param"])
        set_momentum(state, tensors["exp_avg"])
        if local in (on_host := on_host_of(self.optimizer)):
            on_host[local].send_own(local)

    def state_dict(self) -> dict[str, Any]:
        """Parameter groups without parameters, and the loss scale."""
        groups = without_params(self.optimizer.state_dict()["param_groups"])
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    # Distributed checkpoints.

    def sharded_state_dict(
        self, model_sharded_state_dict: Any = None, is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As Megatron's, with the factors under ``came``."""
        model_state = model_sharded_state_dict or {}
        self._is_loading = is_loading
        try:
            state: dict[str, Any] = super().sharded_state_dict(model_state, is_loading, **kwargs)
        finally:
            self._is_loading = False
        state["came"] = sharded_factors(self.optimizer, self._pairs, model_state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Megatron's, with the factors."""
        factors = state_dict.pop("came", None)
        inner = state_dict["optimizer"]
        kept = own_settings_kept(self.optimizer, inner["param_groups"])
        with kept as groups, watched(self.optimizer):
            super().load_state_dict({**state_dict, "optimizer": {**inner, "param_groups": groups}})
        if factors is not None:
            load_factors(self.optimizer, self._pairs, factors)

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, which before 0.20 reads behind padded buckets at the wrong places."""
        with buckets.offsets_as_gathered(self.buffers):
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)

    def get_parameter_state_dp_reshardable(self) -> dict[Any, Any]:
        """As Megatron's, with the padding that belongs to the file."""
        state: dict[Any, Any] = super().get_parameter_state_dp_reshardable()
        if not self._pairs:  # all of this rank's parameters are frozen
            return state
        group, device = self.data_parallel_group, self._pairs[0][0].device
        dtypes = {"param": torch.float32, "exp_avg": self._saved_dtype}
        ranks = group.rank(), group.size()
        for index, ranges in enumerate(self.gbuf_ranges):
            for dtype in ranges:
                found = zip(state[index][dtype], self.buffers[index].buckets, strict=True)
                state[index][dtype] = [
                    buckets.with_padding(pieces, bucket, ranks, dtypes, device)
                    for pieces, bucket in found
                ]
        return state

    @property
    def _saved_dtype(self) -> torch.dtype:
        """Of the momentum in checkpoints: bf16 holds int8's values exactly."""
        small = self.config.momentum_dtype != "fp32" and not self._is_loading
        return torch.bfloat16 if small else torch.float32

    # Legacy checkpoints: one file a model-parallel rank, gathered to and scattered from
    # data-parallel rank 0. Fully reshardable ones are gathered in the same way.

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, with the factors; a chain of optimizers saves what this returns."""
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is not None:
            buckets.cast_momentum(state, self._saved_dtype)
            state["came"] = {
                "format": FORMAT,
                "parameters": self._legacy_factors(),
                "spans": buckets.spans_of(self.buffers),
            }
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
            stop(problem[0])
        if state_dict is not None:
            buckets.arrange(state_dict, self.buffers)
            buckets.cast_momentum(state_dict, torch.float32)
        super().load_parameter_state_from_dp_zero(state_dict, **kwargs)
        for position, factors in enumerate(self._legacy_factors()):
            for key, mine in factors.items():
                if group.rank() == 0:
                    mine.copy_(state_dict["came"]["parameters"][position][key])
                dist.broadcast(mine, group=group, group_src=0)
                self.optimizer.state[self._pairs[position][1]][key].copy_(mine)

    def _legacy_factors(self) -> list[dict[str, Tensor]]:
        """Copy the factors to the CPU, by parameter."""
        return [
            {key: state[key].detach().to("cpu", copy=True) for key in FACTORS if key in state}
            for state in (self.optimizer.state[local] for _, local in self._pairs)
        ]

    def _legacy_problem(self, state_dict: Any) -> str | None:
        """Say in one sentence why the factors of a legacy file do not fit, or None."""
        saved = state_dict.get("came") if isinstance(state_dict, dict) else None
        if saved is None:
            return (
                "the checkpoint holds no factors of CAME: another optimizer has written it. Give "
                "--no-load-optim or --finetune to start CAME afresh from its weights."
            )
        if problem := factors_problem(saved):
            return damaged(problem)
        shapes = [
            [
                {key: torch.is_tensor(value) and value.shape for key, value in factors.items()}
                for factors in parameters
            ]
            for parameters in (saved["parameters"], self._legacy_factors())
        ]
        if shapes[0] != shapes[1]:
            return (
                "the checkpoint's factors of CAME belong to another model or tensor-parallel size: "
                "load it with the flags it was saved with, or give --no-load-optim."
            )
        for factors in saved["parameters"]:
            for key, value in factors.items():
                if value.dtype != torch.float32:
                    return damaged(f"its distrib_optim.pt has {key} in {value.dtype}, not in fp32")
        return buckets.arrangement_problem(state_dict, self.buffers)
