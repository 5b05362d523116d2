"""Resuming with another cut into buckets, which Megatron's default format does not allow."""

from __future__ import annotations

import argparse
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.patching import Function
from megatron_came.voice import stop

# What differs of the flags that decide on buckets, by folder of the checkpoint.
_differences: dict[str, str] = {}


def with_reason(original: Function) -> Function:
    """Say so where a load of CAME's state fails because of other buckets."""

    def _load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        # Megatron reads a checkpoint's arguments first, and its tensors in another call.
        try:
            result = original(load_dir, args, *rest, **kwargs)
        except (Exception, CheckpointException) as error:
            found = _differences.get(str(load_dir))
            if found is None or not _is_of_a_bucket(error):
                raise
            stop(
                f"the checkpoint in {load_dir} was cut into other buckets ({found}), which its "
                "format of optimizer state does not allow: resume with those, save there with "
                "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable and resume from "
                "that, or give --no-load-optim or --finetune.",
                error,
            )
        state = result[0] or {}
        sharding = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
        _differences.pop(str(load_dir), None)
        if sharding == "dp_reshardable" and args.optimizer == "came":
            changed = changes(state.get("args"), args)
            if changed:
                _differences[str(load_dir)] = changed
        return result

    return _load_base_checkpoint


def changes(saved: Any, args: argparse.Namespace) -> str:
    """Say which flags that decide on buckets the run that saved had otherwise; empty if none."""
    found = []
    before, now = (bool(getattr(each, "overlap_grad_reduce", False)) for each in (saved, args))
    if before != now:
        found.append(f"{'with' if before else 'without'} --overlap-grad-reduce")
    for name in ("ddp_bucket_size", "ddp_num_buckets"):
        was, size = getattr(saved, name, None), getattr(args, name, None)
        if was != size:
            flag = "--" + name.replace("_", "-")
            found.append(f"without {flag}" if was is None else f"with {flag} {was}")
    # The size of buckets grows with the number of ranks unless one is given.
    was, size = (getattr(each, "data_parallel_size", 1) for each in (saved, args))
    if before and now and was != size and max(was, size) > _RANKS_OF_LEAST and not found:
        found.append(
            f"at data-parallel size {was}, where --ddp-bucket-size is {_default_size(was)} unless "
            "it is given"
        )
    return ", ".join(found)


_RANKS_OF_LEAST = 40


def _default_size(ranks: int) -> int:
    return max(_RANKS_OF_LEAST, ranks) * 1_000_000


def _is_of_a_bucket(error: BaseException) -> bool:
    """Whether an error, of one rank or of several, names a bucket of the distributed optimizer."""
    errors = [error]
    if isinstance(error, CheckpointException):
        errors += [failure[0] for failure in error.failures.values()]
    return any("bucket_idx" in str(each) for each in errors)
