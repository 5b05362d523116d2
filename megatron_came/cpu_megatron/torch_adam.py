"""Lets Megatron's distributed optimizer resume with torch's own Adam.

On a GPU it has the Adam of Transformer Engine or apex.  With torch's, which it falls back to, three
places of the loading of a checkpoint fail or lose the step count, and each has its stand-in here.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_came.patching import Function


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


def with_state(original: Function) -> Function:
    """Describe a state that is to be loaded, though there is none yet."""

    def sharded_state_dict(
        self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and _is_plain_adam(self.optimizer) and not self.optimizer.state:
            _prepare_state(self.optimizer)
        return original(self, model, is_loading, *args, **kwargs)

    return sharded_state_dict


def with_steps(original: Function) -> Function:
    """Restore step counts after the rest of the state."""

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        if _is_plain_adam(self.optimizer):
            _restore_steps(self.optimizer)

    return load_state_dict


def without_step(original: Function) -> Function:
    """Copy a slice without its step, which some checkpoint formats have and others do not."""

    @torch.no_grad()  # a slice of an fp32 weight is copied in place, which autograd forbids
    def _set_main_param_and_optimizer_states(
        self: Any, model_param: Any, tensors: dict[str, Any]
    ) -> None:
        if _is_plain_adam(self.optimizer):
            tensors = {**tensors, "step": None}
        original(self, model_param, tensors)

    return _set_main_param_and_optimizer_states
