"""Parameter groups as a step reads them, and what single parameters have otherwise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.hyperparameters import GroupSettings, Hyperparameters, at_step, check_step
from megatron_came.core.momentum import MOMENTUM
from megatron_came.core.parameter_slice import gradient_of
from megatron_came.core.shard import Shard
from megatron_came.core.state import STEP, own_count

Group = dict[str, Any]
# Values of fields of Hyperparameters that go before those of a parameter's group.
Own = Mapping[str, Any]
_NO_OWN: Own = {}
States = Mapping[Tensor, Mapping[str, Any]]


class GroupTable:
    """The parameter groups, and behind them each group again for every set of own values in it.

    Args:
        groups: the optimizer's.
        own: by parameter.
        states: of parameters; one that counts its own steps has a row to itself.

    Attributes:
        groups: as they were given.
        number: by parameter, where its settings are in what :meth:`at_step` returns.
    """

    def __init__(self, groups: Sequence[Group], own: Mapping[Tensor, Own], states: States) -> None:
        self.groups = list(groups)
        self.number: dict[Tensor, int] = {}
        self._rows: list[tuple[Group, Own, Tensor | None]] = [
            (each, _NO_OWN, None) for each in groups
        ]
        known: dict[Any, int] = {}
        for index, group in enumerate(groups):
            for param in group["params"]:
                self.number[param] = index
                values = own.get(param, _NO_OWN)
                counts = None if own_count(states.get(param, {})) is None else param
                if values or counts is not None:
                    # Parameters with the same values share a row.
                    key = index, tuple(sorted(values.items())), id(counts)
                    if key not in known:
                        known[key] = len(self._rows)
                        self._rows.append((group, values, counts))
                    self.number[param] = known[key]

    def group_of(self, number: int) -> Group:
        """Return a number's parameter group, with the values of its own."""
        group, own, _ = self._rows[number]
        if not own:
            return group
        return {**group, **replace(Hyperparameters.from_group(group), **own).as_group()}

    def at_step(self, states: States) -> list[GroupSettings]:
        """Read all settings as they are now, and the steps of parameters that count their own.

        Raises:
            HyperparameterError: as :func:`megatron_came.core.hyperparameters.at_step`.
        """
        settings, read = [], dict[tuple[int, int, int | None], GroupSettings]()
        for number, (group, own, param) in enumerate(self._rows):
            count = None if param is None else own_count(states.get(param, {}))
            key = id(group), id(own), None if count is None else check_step(count)
            if key not in read:  # most that count have taken the same steps
                now = self.group_of(number)
                read[key] = at_step(now if count is None else {**now, STEP: key[2]})
            settings.append(read[key])
        return settings


def count_steps(
    groups: Sequence[Group], states: States, state_of: Callable[[Tensor], dict[str, Tensor]]
) -> bool:
    """Let each parameter count its own steps where a group has bias correction.

    So that, as Adam's, goes by what a parameter's averages have seen: also of one that gets its
    first gradient late, or not in each step. All of them count, so that state of a new optimizer
    has what checkpoints hold: PyTorch loads nothing else. Return whether there is one more that
    counts; ``state_of`` returns a parameter's state, made anew if there is none.
    """
    is_new = False
    for group in groups:
        taken = check_step(group.get("step", 0))
        for param in group["params"] if group.get("bias_correction") else ():
            state = states.get(param, {})
            has_state = MOMENTUM in state
            takes_part = gradient_of(param) is not None and param.numel() > 0
            if STEP not in state and (has_state or takes_part):
                # State of before bias correction was asked for has seen the group's steps.
                own = torch.tensor(taken * has_state, dtype=torch.int64, device="cpu")
                state_of(param)[STEP] = own
                is_new = True
    return is_new


def whole_shard(
    param: Tensor, groups: Sequence[Mapping[str, Any]], flat_convolutions: bool
) -> Shard:
    """Return the shard of a parameter, of one of the groups, that a rank holds alone."""
    shape = tuple(param.shape)
    if flat_convolutions and len(shape) > 2:
        shape = (shape[0], math.prod(shape[1:]))
    unfactored = (group["params"] for group in groups if group.get("factored") is False)
    # By identity: == of tensors compares their elements.
    is_factored = not any(param is each for params in unfactored for each in params)
    return replace(Shard.whole(shape), factored=is_factored)


def layout_settings(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what of the groups decides how a step is planned."""
    return [(group.get("cautious"), group.get("factored", True)) for group in groups]
