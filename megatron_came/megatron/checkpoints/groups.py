"""Parameter groups of a resumed run: whose hyperparameters count, and which saved group is whose.

Megatron takes each group's settings from the saved group that has the same identifying keys. In
0.19 the rates are among these keys, so another ``--lr`` finds no group; before, groups that
differ in rates alone get each other's, and the saved rates go before those of the flags. Here a
group keeps its own settings, and takes from the checkpoint the number of steps and, where Megatron
would go on with them, the rates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from megatron_came.optimizer import CAME

Group = dict[str, Any]
Groups = Sequence[Mapping[str, Any]]

# Whether rates are this run's: --override-opt_param-scheduler.
own_rates: ContextVar[bool] = ContextVar("own_rates", default=False)

RATES = ("max_lr", "min_lr")
# What goes on as it was, unless rates are this run's; the last two are set before each step.
_SCHEDULED = (*RATES, "start_wd", "end_wd", "lr", "weight_decay")
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")


@contextlib.contextmanager
def own_settings_kept(came: CAME, saved: list[Group]) -> Iterator[list[Group]]:
    """Keep hyperparameters over the loading of a state dictionary.

    Args:
        came: the optimizer.
        saved: the parameter groups of the state dictionary.

    Yields:
        Groups to load in place of those that were saved.
    """
    wanted = settings_to_load(came.param_groups, saved)
    groups = []
    for index, (own, settings) in enumerate(zip(came.param_groups, wanted, strict=True)):
        params = saved[index].get("params", []) if index < len(saved) else []
        # Megatron finds a group by its own settings, rates included.
        groups.append({**own, "step": settings["step"], "params": params})
    yield groups
    for group, settings in zip(came.param_groups, wanted, strict=True):
        group.update(settings)


def settings_to_load(own: Sequence[Group], saved: Groups) -> list[Group]:
    """Return what each group goes on with, without its parameters.

    Args:
        own: this run's groups.
        saved: the checkpoint's, in any order, all with the same number of steps.
    """
    settings = []
    for group, match in zip(own, matching(own, saved), strict=True):
        mine = {key: value for key, value in group.items() if key != "params"}
        if saved:
            mine["step"] = saved[0]["step"]
        if match is not None and not own_rates.get():
            mine |= {
                key: match[key]
                for key in _SCHEDULED
                if key in group and key in match and not isinstance(group[key], Tensor)
            }
        settings.append(mine)
    return settings


def matching(own: Groups, saved: Groups) -> list[Mapping[str, Any] | None]:
    """Return for each group the saved one that held its parameters; None where it is not known.

    Groups stand in an order that Megatron makes of their settings, so those of equal position
    belong together, unless others are there; then the only ones of their kind do.
    """
    kinds, its_kinds = [*map(_kind, own)], [*map(_kind, saved)]
    if kinds == its_kinds and not _reordered(own, saved):
        return list(saved)
    found: list[Mapping[str, Any] | None] = []
    for group, kind in zip(own, kinds, strict=True):
        same = [other for other, its in zip(saved, its_kinds, strict=True) if its == kind]
        exact = [other for other in same if _rates(other) == _rates(group)]
        alone = len(same) == 1 and kinds.count(kind) == 1
        found.append(exact[0] if len(exact) == 1 else same[0] if alone else None)
    return found


def same_order(own: Groups, saved: Groups) -> bool:
    """Whether saved groups hold the same parameters as this run's, in the same order."""
    sizes, its_sizes = (
        [len(group["params"]) for group in groups if "params" in group] for groups in (own, saved)
    )
    return (
        [*map(_kind, own)] == [*map(_kind, saved)]
        and not _reordered(own, saved)
        and its_sizes in ([], sizes)
    )


def _kind(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells groups apart beside their rates; NeMo writes ``pre_`` before some keys."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _IDENTITY)


def _rates(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in RATES)


def _reordered(own: Groups, saved: Groups) -> bool:
    """Whether the same rates stand in another order."""
    mine, its = [*map(_rates, own)], [*map(_rates, saved)]
    return mine != its and sorted(map(repr, mine)) == sorted(map(repr, its))
