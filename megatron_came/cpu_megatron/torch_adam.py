"""Lets Megatron's distributed optimizer resume with torch's own Adam.

On a GPU it has the Adam of Transformer Engine or apex.  With torch's, which it falls back to, three
places of the loading of a checkpoint fail or lose the step count, and each has its stand-in here.
"""

import functools
import itertools
from typing import Any

import torch


def _is_plain_adam(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _prepare_state(adam: torch.optim.Optimizer) -> None:
    """Give ``adam`` the state that it would have after no step: Megatron looks for one to load."""
    for parameter in itertools.chain(*(group["params"] for group in adam.param_groups)):
        adam.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _restore_steps(adam: torch.optim.Optimizer) -> None:
    """Give each parameter the step count that Megatron saves once for a group of parameters.

    Megatron gives all of them the same tensor, in which each would count.
    """
    for group in adam.param_groups:
        for parameter in group["params"]:
            if "step" in group and parameter in adam.state:
                adam.state[parameter]["step"] = torch.tensor(float(group["step"]))


def install() -> None:
    """Put the stand-ins in place, for good."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    describe = DistributedOptimizer.sharded_state_dict
    load = DistributedOptimizer.load_state_dict
    copy_shard = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(describe)
    def sharded_state_dict(
        self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and _is_plain_adam(self.optimizer) and not self.optimizer.state:
            _prepare_state(self.optimizer)
        return describe(self, model, is_loading, *args, **kwargs)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        if _is_plain_adam(self.optimizer):
            _restore_steps(self.optimizer)

    @functools.wraps(copy_shard)
    @torch.no_grad()  # a shard of an fp32 weight is copied in place, which autograd forbids
    def copy_shard_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if _is_plain_adam(self.optimizer):
            tensors = {**tensors, "step": None}  # some checkpoint formats have it, others do not
        copy_shard(self, model_param, tensors)

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = copy_shard_without_step
