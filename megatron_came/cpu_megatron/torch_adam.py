"""Lets Megatron's distributed optimizer resume with torch's own Adam.

On a GPU it has the Adam of Transformer Engine or apex.  With torch's, which it falls back to, three
places of the loading of a checkpoint fail or lose the step count, and each has its stand-in here.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_came.patching import Function, around


def _is_plain_adam(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


@around
def with_state(
    original: Function, self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
) -> Any:
    """Describe a state that is to be loaded, though there is none yet: that after no step."""
    if is_loading and _is_plain_adam(self.optimizer) and not self.optimizer.state:
        for parameter in itertools.chain(*(g["params"] for g in self.optimizer.param_groups)):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return original(self, model, is_loading, *args, **kwargs)


@around
def with_steps(original: Function, self: Any, state_dict: Any) -> None:
    """Give each parameter the step count that Megatron saves once for a group of parameters.

    Megatron gives all of them the same tensor, in which each would count.
    """
    original(self, state_dict)
    adam = self.optimizer
    for group in adam.param_groups if _is_plain_adam(adam) else ():
        for parameter in group["params"]:
            if "step" in group and parameter in adam.state:
                adam.state[parameter]["step"] = torch.tensor(float(group["step"]))


@around
@torch.no_grad()  # a slice of an fp32 weight is copied in place, which autograd forbids
def without_step(original: Function, self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    """Copy a slice without its step, which some checkpoint formats have and others do not."""
    if _is_plain_adam(self.optimizer):
        tensors = {**tensors, "step": None}
    original(self, model_param, tensors)
