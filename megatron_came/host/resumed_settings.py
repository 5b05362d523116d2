"""Hyperparameters and precisions of a resumed run are those of its flags, not the checkpoint's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

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
    if changes:
        _say_once(f"megatron_came: training goes on with {', '.join(changes)}.")


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
        _say_once(
            f"megatron_came: --came-momentum-dtype {now} (the checkpoint's run had {before}): "
            f"momentum is {how}."
        )
    elif now == "int8" and _layout(saved) != _layout(args):
        _say_once(
            "megatron_came: --came-momentum-dtype int8 at another layout than the checkpoint's: "
            f"blocks differ, so momentum is rounded {_ROUNDED[now]}."
        )
    before, now = getattr(saved, "came_main_params", "fp32"), args.came_main_params
    if before != now:
        _say_once(
            f"megatron_came: --came-main-params {now} (the checkpoint's run had {before}): the "
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


@functools.cache
def _say_once(sentence: str) -> None:
    """Once, though dense and expert parameters have an optimizer each; on one rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(sentence, flush=True)
