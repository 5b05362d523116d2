"""Parameter groups of a resumed run: whose hyperparameters count, and which saved group is whose.

Megatron takes each group's settings from the saved group that has the same identifying keys. In
0.19 the rates are among these keys, so another ``--lr`` finds no group; before, groups that
differ in rates alone get each other's, and the saved rates go before those of the flags. Here a
group keeps its own settings, and takes from the checkpoint the number of steps and, where Megatron
would go on with them, the rates.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_came.megatron.checkpoints.under_way import current
from megatron_came.optimizer import CAME

Group = dict[str, Any]
Groups = Sequence[Mapping[str, Any]]

RATES = ("max_lr", "min_lr")
# What goes on as it was, unless rates are this run's; the last two are set before each step.
_SCHEDULED = (*RATES, "start_wd", "end_wd", "lr", "weight_decay")
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")


@contextlib.contextmanager
def own_settings_kept(came: CAME, saved: list[Group]) -> Iterator[list[Group]]:
    """Keep hyperparameters over the loading of a state dictionary with these parameter groups.

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


def without_params(groups: Groups) -> list[Group]:
    """Return parameter groups without their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def settings_to_load(own: Sequence[Group], saved: Groups) -> list[Group]:
    """Return what each of this run's groups goes on with, without its parameters.

    Saved groups are in any order, all with the same number of steps.
    """
    settings, load = [], current.get()
    takes_rates = load is None or not load.own_rates
    for mine, match in zip(without_params(own), matching(own, saved), strict=True):
        if saved:
            mine["step"] = saved[0]["step"]
        if match is not None and takes_rates:
            mine |= {
                key: match[key]
                for key in _SCHEDULED
                if key in mine and key in match and not isinstance(mine[key], Tensor)
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
    # By repr, since None and numbers have no order.
    return mine != its and sorted(map(repr, mine)) == sorted(map(repr, its))
