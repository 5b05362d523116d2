"""Compares the tensors of a checkpoint, and its files, with what a run is going to load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.megatron.checkpoints import model_differences
from megatron_came.megatron.checkpoints.folders import legacy_problem, tracked
from megatron_came.megatron.checkpoints.loads import Load, current
from megatron_came.voice import end_if, say_once


def compare_tensors(
    load: Load,
    place: str,
    asked: model_differences.Asked,
    state: Mapping[str, Any],
    args: Any,
    resumes: bool,
) -> None:
    """Refuse or say what of a distributed checkpoint's tensors the run takes otherwise."""
    folder = place if os.path.isdir(place) else os.path.dirname(place)
    saved: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            saved[0] = model_differences.saved_shapes(folder)
        except (CheckpointError, OSError) as error:  # of one rank: all are to hear of it
            saved[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(saved, 0)
    end_if(saved[1])
    left, untrained = model_differences.left_over(asked, saved[0])
    problem = model_differences.leftover_refusal(left, load.differing) if resumes else None
    changed = model_differences.vocabulary_change(asked, saved[0])
    sentence = None
    if changed is not None:
        sentence, refused = model_differences.vocabulary_sentence(*changed, state.get("args"), args)
        problem = problem or (sentence if refused else None)
    end_if(problem)
    for notice in (
        *([sentence] if sentence else []),
        *model_differences.notices([] if resumes else left, untrained=untrained),
    ):
        say_once(notice)


def compare_legacy_tensors(load: Load, state: Mapping[str, Any], resumes: bool) -> str | None:
    """Return why this rank's part of a ``torch`` checkpoint does not fit, or say what is left."""
    asked, saved = model_differences.legacy_tensors(load.model_chunks, state)
    left = [name for name in saved if name not in asked.shapes]
    if resumes:
        return model_differences.misfit(
            asked, saved, load.differing
        ) or model_differences.leftover_refusal(left, load.differing)
    for notice in model_differences.notices(left, [n for n in asked.shapes if n not in saved]):
        say_once(notice)
    return None


def misfit_of(
    load_dir: Any, args: Any, asked: model_differences.Asked | None, load: Load | None
) -> str | None:
    """Say which tensor has made Megatron give up, if it was one; no other rank takes part."""
    from megatron.training import checkpointing

    if asked is None or load is None:
        return None
    try:
        name = checkpointing.get_checkpoint_name(
            load_dir, *_named_iteration(load_dir, args), return_base_dir=True
        )
        return model_differences.misfit(asked, model_differences.saved_shapes(name), load.differing)
    except (Exception, CheckpointException):  # what is unreadable is said otherwise
        return None


def _named_iteration(load_dir: Any, args: Any) -> tuple[int, bool]:
    named = str(getattr(args, "ckpt_step", None) or tracked(load_dir))
    return (0, True) if named == "release" else (int(named), False)


def missing_files(load_dir: Any, args: Any) -> str | None:
    """Look for the files of a ``torch`` checkpoint that this rank is going to read."""
    from megatron.core import mpu
    from megatron.training import checkpointing

    if load_dir is None or args.non_persistent_ckpt_type is not None:
        return None
    if not dist.is_initialized() or not mpu.model_parallel_is_initialized():
        return None
    try:
        iteration = _named_iteration(load_dir, args)
    except (OSError, TypeError, ValueError):  # nothing to resume from
        return None
    base = checkpointing.get_checkpoint_name(load_dir, *iteration, return_base_dir=True)
    if os.path.isfile(os.path.join(base, "metadata.json")):
        return None
    return legacy_problem(load_dir, [checkpointing.get_checkpoint_name(load_dir, *iteration)])


def missing_state(load: Load, args: Any) -> str | None:
    """Look for the file of the optimizer's state beside the ``torch`` checkpoint that was read."""
    from megatron.training import checkpointing

    if not args.use_distributed_optimizer or not _reads_state():
        return None
    iteration = _named_iteration(load.folder, args)
    weights = checkpointing.get_checkpoint_name(load.folder, *iteration)
    state = checkpointing.get_distributed_optimizer_checkpoint_name(weights)
    return legacy_problem(load.folder, [state])


def _reads_state() -> bool:
    """Whether this rank reads the file of the distributed optimizer for its data-parallel group."""
    load = current.get()
    parts = getattr(load.optimizer, "chained_optimizers", [load.optimizer]) if load else []
    return any(
        not part.is_stub_optimizer and part.data_parallel_group.rank() == 0 for part in parts
    )
