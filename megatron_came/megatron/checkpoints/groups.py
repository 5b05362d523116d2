"""Parameter groups of a resumed run: whose hyperparameters count, and which saved group is whose.

Megatron takes each group's settings from the saved group that has the same identifying keys. In
0.19 the rates are among these keys, so another ``--lr`` finds no group; before, groups that
differ in rates alone get each other's, and the saved rates go before those of the flags. Here a
group keeps its own settings, and takes from the checkpoint the number of steps and, where Megatron
would go on with them, the rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor

Group = dict[str, Any]

# Whether rates are this run's: --override-opt_param-scheduler.
own_rates: ContextVar[bool] = ContextVar("own_rates", default=False)

RATES = ("max_lr", "min_lr")
_SCHEDULED = (*RATES, "start_wd", "end_wd")
# What the scheduler sets before each step.
_CURRENT = ("lr", "weight_decay")
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")


def settings_to_load(own: Sequence[Group], saved: Sequence[Mapping[str, Any]]) -> list[Group]:
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
                for key in (*_SCHEDULED, *_CURRENT)
                if key in group and key in match and not isinstance(group[key], Tensor)
            }
        settings.append(mine)
    return settings


def matching(
    own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any] | None]:
    """Return for each group the saved one that held its parameters; None where it is not known.

    Groups stand in an order that Megatron makes of their settings, so those of equal position
    belong together, unless others are there; then the only ones of their kind do.
    """
    kinds = [[_kind(group) for group in groups] for groups in (own, saved)]
    if kinds[0] == kinds[1] and not _reordered(own, saved):
        return list(saved)
    found: list[Mapping[str, Any] | None] = []
    for group, kind in zip(own, kinds[0], strict=True):
        same = [other for other, its in zip(saved, kinds[1], strict=True) if its == kind]
        exact = [other for other in same if _rates(other) == _rates(group)]
        alone = len(same) == 1 and kinds[0].count(kind) == 1
        found.append(exact[0] if len(exact) == 1 else same[0] if alone else None)
    return found


def same_order(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> bool:
    """Whether saved groups hold the same parameters as this run's, in the same order."""
    sizes = [
        [len(group["params"]) for group in groups if "params" in group] for groups in (own, saved)
    ]
    return (
        [_kind(group) for group in own] == [_kind(group) for group in saved]
        and not _reordered(own, saved)
        and (not sizes[1] or sizes[0] == sizes[1])
    )


def _kind(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells groups apart beside their rates; NeMo writes ``pre_`` before some keys."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _IDENTITY)


def _rates(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in RATES)


def _reordered(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the same rates stand in another order."""
    return [_rates(group) for group in own] != [_rates(group) for group in saved] and sorted(
        repr(_rates(group)) for group in own
    ) == sorted(repr(_rates(group)) for group in saved)
