"""Hyperparameters and precisions of a resumed run are those of its flags, not the checkpoint's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_came.megatron.checkpoints.groups import settings_to_load
from megatron_came.optimizer import CAME
from megatron_came.voice import say_once

_FLAGS = {
    "betas": ("--came-beta1", "--came-beta2", "--came-beta3"),
    "eps": ("--came-eps1", "--came-eps2"),
    "clip_threshold": ("--came-clip-threshold",),
}


@contextlib.contextmanager
def own_settings_kept(came: CAME, saved: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Keep hyperparameters over the loading of a state dictionary, and say what differs.

    Args:
        came: the optimizer.
        saved: the parameter groups of the state dictionary.

    Yields:
        Groups to load in place of those that were saved.
    """
    wanted = settings_to_load(came.param_groups, saved)
    groups = []
    for index, (own, settings) in enumerate(zip(came.param_groups, wanted, strict=True)):
        # Megatron finds a group by its own settings, rates included.
        groups.append({**own, "step": settings["step"], "params": []})
        if index < len(saved) and "params" in saved[index]:
            groups[-1]["params"] = saved[index]["params"]
    yield groups
    for group, settings in zip(came.param_groups, wanted, strict=True):
        group.update(settings)
    _say_changes(came.param_groups, saved)


def _say_changes(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    changes: dict[str, None] = {}
    for group, match in zip(own, saved, strict=False):
        for key, flags in _FLAGS.items():
            now, before = (
                value if isinstance(value, tuple | list) else (value,)
                for value in (group[key], match.get(key, group[key]))
            )
            for flag, mine, its in zip(flags, now, before, strict=True):
                if mine != its:
                    changes[f"{flag} {mine:g} (the checkpoint's run had {its:g})"] = None
    if changes:
        say_once(f"training goes on with {', '.join(changes)}.")


# How far an element of the momentum is from what was saved, at most.
_ROUNDED = {
    "bf16": "to nearest, by at most 1/256 of itself",
    "int8": "to nearest, by at most 1/127 of the largest of its block of 256",
}


def say_conversions(saved: Any, args: Any) -> None:
    """Say how a checkpoint's momentum and main weights become those of this run, if they change.

    Args:
        saved: Megatron's arguments of the run that saved it.
        args: Megatron's arguments of this run.
    """
    before, now = getattr(saved, "came_momentum_dtype", "fp32"), args.came_momentum_dtype
    if before != now:
        exact = now == "fp32" or (before, now) == ("int8", "bf16")
        how = "taken over exactly" if exact else f"rounded {_ROUNDED[now]}"
        say_once(
            f"--came-momentum-dtype {now} (the checkpoint's run had {before}): momentum is {how}."
        )
    elif now == "int8" and _layout(saved) != _layout(args):
        say_once(
            "--came-momentum-dtype int8 at another layout than the checkpoint's: "
            f"blocks differ, so momentum is rounded {_ROUNDED[now]}."
        )
    before, now = getattr(saved, "came_main_params", "fp32"), args.came_main_params
    if before != now:
        say_once(
            f"--came-main-params {now} (the checkpoint's run had {before}): the "
            "main weights are taken over bit for bit."
        )


def _layout(args: Any) -> tuple[object, ...]:
    sizes = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    more = ("virtual_pipeline_model_parallel_size", "context_parallel_size")
    experts = ("expert_model_parallel_size", "expert_tensor_parallel_size")
    buckets = ("overlap_grad_reduce", "ddp_bucket_size", "ddp_num_buckets")
    slices = ("use_distributed_optimizer", "num_distributed_optimizer_instances", *buckets)
    padding = ("ddp_pad_buckets_for_high_nccl_busbw", "make_vocab_size_divisible_by")
    names = (*sizes, *more, *experts, *slices, *padding)
    return tuple(getattr(args, name, None) for name in names)
