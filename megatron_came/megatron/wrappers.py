"""CAME in Megatron's fp32 and fp16/bf16 wrappers, which hold whole local tensors."""

from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from megatron_came.core.momentum import MOMENTUM
from megatron_came.core.saved import saved_momentum
from megatron_came.dtensors import is_dtensor, state_here
from megatron_came.megatron.checkpoints import fsdp2
from megatron_came.megatron.checkpoints.digests.verifying import watched
from megatron_came.megatron.checkpoints.factors import load_factors, sharded_factors
from megatron_came.megatron.checkpoints.groups import own_settings_kept
from megatron_came.megatron.cpu_offload import Offloaded
from megatron_came.megatron.parameter_names import Identity
from megatron_came.megatron.sharding import ModelGroups, adopt
from megatron_came.megatron.spikes import WithSpikeGuard
from megatron_came.optimizer import CAME


class _WholeTensors(WithSpikeGuard, Offloaded):
    """Tells CAME its shards in a wrapper of whole local tensors, and checkpoints the factors.

    The wrapper's own checkpoints know only state of the parameter's shape.
    """

    @staticmethod
    def _filter_and_reorder_param_groups(
        current_groups: list[dict[str, Any]], state_dict_groups: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Take the groups as they are: :meth:`load_state_dict` has paired them."""
        return state_dict_groups

    def adopt(
        self,
        model_params: list[list[Tensor]],
        model_groups: ModelGroups,
        identities: dict[Tensor, Identity] | None,
    ) -> None:
        """Tell the optimizer of the model's parameters, by parameter group: see :func:`.adopt`.

        The wrapper may have put fp32 copies in their place.
        """
        self._pairs = []
        if self.optimizer is None:
            return
        for group, params in zip(self.optimizer.param_groups, model_params, strict=True):
            self._pairs += zip(params, group["params"], strict=True)
        adopt(self.optimizer, self._pairs, model_groups, identities)

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        """As the wrapper's, with the factors under ``came``; int8 momentum as bf16."""
        parent = super().sharded_state_dict  # type: ignore[misc]
        if self.optimizer is None:
            return parent(model_sharded_state_dict, is_loading, **kwargs)
        # What is loaded is asked for in fp32, whatever it was saved in.
        hook = partial(_leave_momentum, torch.float32 if is_loading else None)
        with self.optimizer.register_state_dict_post_hook(hook), fsdp2.parameters_found():
            state = parent(model_sharded_state_dict, is_loading, **kwargs)
        state["came"] = sharded_factors(self.optimizer, self._pairs, model_sharded_state_dict)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapper's; a legacy checkpoint has the factors among the rest of the state."""
        factors = state_dict.pop("came", None)
        if self.optimizer is None:
            super().load_state_dict(state_dict)  # type: ignore[misc]
            return
        inner = state_dict.get("optimizer", state_dict)
        kept = own_settings_kept(self.optimizer, inner["param_groups"])
        with kept as groups, watched(self.optimizer):
            inner["param_groups"] = groups
            self._lay_out(state_dict, inner)
            super().load_state_dict(state_dict)  # type: ignore[misc]
        if factors is not None:
            self.optimizer.init_state()  # what was loaded is momentum
            load_factors(self.optimizer, self._pairs, factors)

    def _lay_out(self, state_dict: dict[str, Any], inner: dict[str, Any]) -> None:
        """Make DTensors of FSDP2's momentum and main weights, which a checkpoint has as rows."""
        if not any(is_dtensor(local) for _, local in self._pairs):
            return
        numbers = chain.from_iterable(group["params"] for group in inner["param_groups"])
        # CAME says what lacks.
        for number, (_, local) in zip(numbers, self._pairs, strict=False):
            state = inner["state"].get(number, {})
            if MOMENTUM in state:
                state[MOMENTUM] = fsdp2.like(local, state[MOMENTUM])
        for own, saved in zip(
            getattr(self, "fp32_from_float16_groups", ()),
            state_dict.get("fp32_from_fp16_params", ()),
            strict=False,
        ):
            saved[:] = map(fsdp2.like, own, saved)


class CameFP32Optimizer(_WholeTensors, FP32Optimizer):  # type: ignore[misc]
    """Megatron's ``FP32Optimizer`` around :class:`megatron_came.CAME`."""


class CameFloat16Optimizer(_WholeTensors, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    """Megatron's ``Float16OptimizerWithFloat16Params`` around :class:`megatron_came.CAME`."""


def _leave_momentum(dtype: torch.dtype | None, _: CAME, state_dict: dict[str, Any]) -> None:
    """Leave of a state the momentum alone, in floats, as Megatron knows it."""
    for index, state in state_dict["state"].items():
        state_dict["state"][index] = {MOMENTUM: saved_momentum(state_here(state), dtype)}
