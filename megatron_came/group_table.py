"""Parameter groups as a step reads them, and what single parameters have otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_came.core.hyperparameters import GroupSettings, Hyperparameters, at_step
from megatron_came.core.shard import Shard

Group = dict[str, Any]
# Values of fields of Hyperparameters that go before those of a parameter's group.
Own = Mapping[str, Any]


class GroupTable:
    """The parameter groups, and behind them each group again for every set of own values in it.

    Attributes:
        groups: as they were given.
        number: by parameter, where its settings are in what :meth:`at_step` returns.
    """

    def __init__(self, groups: Sequence[Group], own: Mapping[Tensor, Own]) -> None:
        self.groups = list(groups)
        self.number: dict[Tensor, int] = {}
        self._rows: list[tuple[Group, Own]] = [(group, {}) for group in groups]
        known: dict[Any, int] = {}
        for index, group in enumerate(groups):
            for param in group["params"]:
                self.number[param] = index
                if values := own.get(param):
                    key = index, tuple(sorted(values.items()))
                    if key not in known:
                        known[key] = len(self._rows)
                        self._rows.append((group, values))
                    self.number[param] = known[key]

    def group_of(self, number: int) -> Group:
        """Return a number's parameter group, with the values of its own."""
        group, own = self._rows[number]
        if not own:
            return group
        return {**group, **replace(Hyperparameters.from_group(group), **own).as_group()}

    def at_step(self) -> list[GroupSettings]:
        """Read all settings as they are now.

        Raises:
            HyperparameterError: as :func:`megatron_came.core.hyperparameters.at_step`.
        """
        return [at_step(self.group_of(number)) for number in range(len(self._rows))]


def whole_shard(
    param: Tensor, groups: Sequence[Mapping[str, Any]], flat_convolutions: bool
) -> Shard:
    """Return the shard of a parameter, of one of the groups, that a rank holds alone."""
    shape = tuple(param.shape)
    if flat_convolutions and len(shape) > 2:
        shape = (shape[0], math.prod(shape[1:]))
    unfactored = (group["params"] for group in groups if group.get("factored") is False)
    is_factored = not any(param is each for params in unfactored for each in params)
    return replace(Shard.whole(shape), factored=is_factored)


def layout_settings(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what of the groups decides how a step is planned."""
    return [(group.get("cautious"), group.get("factored", True)) for group in groups]
