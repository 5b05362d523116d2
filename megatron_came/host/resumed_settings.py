"""The hyperparameters of a resumed run are those of its flags, not those of the checkpoint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch.distributed as dist

from megatron_came.optimizer import CAME

_FLAGS = {
    "betas": ("--came-beta1", "--came-beta2", "--came-beta3"),
    "eps": ("--came-eps1", "--came-eps2"),
    "clip_threshold": ("--came-clip-threshold",),
}


@contextlib.contextmanager
def own_settings_kept(came: CAME) -> Iterator[None]:
    """Keep hyperparameters over the loading of a state dictionary, and say what differs."""
    before = [{key: group[key] for key in _FLAGS} for group in came.param_groups]
    yield
    changes: dict[str, None] = {}
    for group, mine in zip(came.param_groups, before, strict=True):
        for key, flags in _FLAGS.items():
            values = [
                value if isinstance(value, tuple | list) else (value,)
                for value in (group.get(key, mine[key]), mine[key])
            ]
            for flag, saved, own in zip(flags, *values, strict=True):
                if saved != own:
                    changes[f"{flag} {own:g} (the checkpoint's run had {saved:g})"] = None
        group.update(mine)
    if changes and (not dist.is_initialized() or dist.get_rank() == 0):
        _say_once(f"megatron_came: training goes on with {', '.join(changes)}.")


@functools.cache
def _say_once(sentence: str) -> None:
    """Once, though dense and expert parameters have an optimizer each."""
    print(sentence, flush=True)
