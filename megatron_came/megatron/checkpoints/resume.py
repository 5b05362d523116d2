"""Stops a run that cannot resume as its flags say, between Megatron's reading and its loading.

Megatron reads what a distributed checkpoint holds beside tensors (and of a ``torch`` one all), then
the tensors, and loads both into model, optimizer and schedule. After each, all ranks agree whether
one of them has found a problem, so that they end together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.megatron.checkpoints import changed_flags, contents, model_differences
from megatron_came.megatron.checkpoints.contents import AFRESH
from megatron_came.megatron.checkpoints.folders import folder_problem, tracked
from megatron_came.megatron.checkpoints.groups import own_rates, same_order
from megatron_came.megatron.checkpoints.loads import Load, current
from megatron_came.megatron.checkpoints.refusals import refusal
from megatron_came.megatron.checkpoints.settings import say_conversions
from megatron_came.megatron.checkpoints.tensors import (
    compare_legacy_tensors,
    compare_tensors,
    misfit_of,
    missing_files,
    missing_state,
)
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.patching import Function
from megatron_came.voice import end_if, say_once, stop


def with_sentences(original: Function) -> Function:
    """End all ranks with one sentence where a load fails."""

    def load_checkpoint(
        ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        if optimizer is None:
            return original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
        run = get_args()
        load = Load(ddp_model, optimizer, opt_param_scheduler)
        tokens = current.set(load), own_rates.set(bool(run.override_opt_param_scheduler))
        try:
            result = original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
        except (UnsupportedError, torch.OutOfMemoryError, dist.DistError):
            raise  # the checkpoint is not to blame
        except SystemExit as end:
            if run.optimizer != "came" or end.code or load.finished:
                raise
            stop(
                f"the checkpoint in {load.folder or run.load} lacks what Megatron needs to resume "
                "(see the line above): without random states give --no-load-rng, otherwise resume "
                f"from another one with --ckpt-step ITERATION, or {AFRESH}."
            )
        except Exception as error:
            if run.optimizer != "came":
                raise
            stop(unreadable(load.folder or run.load, error), error)
        finally:
            current.reset(tokens[0])
            own_rates.reset(tokens[1])
        if run.optimizer == "came":
            _after(opt_param_scheduler, result[0], run)
        return result

    return load_checkpoint


def _after(scheduler: Any, iteration: int, args: Any) -> None:
    if iteration and scheduler is not None:
        # Megatron sets weight decay before it has loaded its schedule.
        scheduler.step(0)
    if args.train_iters and iteration >= args.train_iters and not args.skip_train:
        say_once(
            f"the checkpoint is at iteration {iteration}, and --train-iters {args.train_iters} "
            "leaves nothing to train."
        )


def with_checks(original: Function) -> Function:
    """Check a checkpoint while Megatron reads it."""

    def _load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        load = current.get()
        if load is None and (dist.is_initialized() or args.optimizer != "came"):
            return original(load_dir, args, *rest, **kwargs)
        if args.optimizer != "came":
            result = original(load_dir, args, *rest, **kwargs)
            _refuse_state_of_came(result, args)
            return result
        if load is not None:
            load.folder = load_dir
        end_if(folder_problem(load_dir, args) or missing_files(load_dir, args))
        sharded_state = kwargs.get("sharded_state_dict")
        asked = None if sharded_state is None else model_differences.asked_for(sharded_state)
        try:
            result = original(load_dir, args, *rest, **kwargs)
        except SystemExit as end:
            nothing_there = not args.ckpt_step and tracked(load_dir) is None
            if end.code or (args.exit_on_missing_checkpoint and nothing_there):
                if load is not None:
                    load.finished = True
                raise
            stop(unreadable(load_dir, OSError("Megatron could not load its file")))
        except (Exception, CheckpointException) as error:
            stop(misfit_of(load_dir, args, asked, load) or unreadable(load_dir, error), error)
        if load is not None and result[0] is not None:
            of_rank_0 = bool(kwargs.get("rank0", rest and rest[0]))
            _check(load, result, asked, args, of_rank_0)
        return result

    return _load_base_checkpoint


def _refuse_state_of_came(result: Any, args: Any) -> None:
    state, _, release, _ = result
    if state and state.get("args") is not None and not release:
        problem = refusal(state["args"], args, None)
        if problem:
            stop(problem)


def _check(
    load: Load, result: Any, asked: model_differences.Asked | None, args: Any, of_rank_0: bool
) -> None:
    """Stop on all ranks, if one of them cannot resume from what Megatron has read.

    Args:
        load: what it is loaded into.
        result: of Megatron's reading.
        asked: which tensors were read; None where they were not, or a ``torch`` checkpoint was.
        args: Megatron's arguments of this run.
        of_rank_0: whether every rank has read what rank 0 saved, to know its settings.
    """
    state, place, release, kind = result
    legacy = getattr(kind, "name", None) == "LEGACY"
    resumes = not (release or args.finetune)
    with_optimizer = resumes and not args.no_load_optim
    if state.get("args") is not None:
        load.differing = changed_flags.differences(state["args"], args)
    problem = _problem(load, state, args, legacy, resumes, with_optimizer)
    if problem is None and legacy and not of_rank_0:
        problem = compare_legacy_tensors(load, state, with_optimizer)
    if problem is None and with_optimizer and not (legacy and of_rank_0):
        problem = _settings_problem(load, state, args, legacy)
        if problem is None and legacy:
            problem = missing_state(load, args)
    end_if(problem)
    if asked is not None and getattr(kind, "name", None) != "LOCAL":  # each rank has its own file
        compare_tensors(load, place, asked, state, args, with_optimizer)
    if with_optimizer and not of_rank_0:
        say_conversions(state["args"], args)
        for sentence in changed_flags.said_changes(state["args"], args):
            say_once(sentence)


def _problem(
    load: Load,
    state: Mapping[str, Any],
    args: Any,
    legacy: bool,
    resumes: bool,
    with_optimizer: bool,
) -> str | None:
    damage = None
    if resumes:
        damage = contents.progress_problem(state)
        if damage is None:
            metadata = state.get("content_metadata") or {}
            sharding = "legacy" if legacy else metadata.get("distrib_optim_sharding_type")
            problem = changed_flags.model_refusal(state["args"], args)
            if problem := problem or refusal(state["args"], args, sharding):
                return problem
    if damage is None and with_optimizer:
        damage = contents.schedule_problem(state)
        if damage is None and _is_whole(state, legacy):
            damage = contents.optimizer_problem(state.get("optimizer"))
    return None if damage is None else contents.damaged(damage, load.folder)


def _settings_problem(load: Load, state: Mapping[str, Any], args: Any, legacy: bool) -> str | None:
    """Say in one sentence why the groups or the schedule of a checkpoint do not fit, or None."""
    groups = list(_groups(load.optimizer, state.get("optimizer")))
    by_order = legacy or not args.use_distributed_optimizer
    if by_order and not all(same_order(mine, its) for mine, its in groups):
        return (
            "the checkpoint's parameters are in other groups than this run's (--decoupled-lr, "
            "--use-mup, weight decay), and its format stores the optimizer's state by their "
            f"order: give the flags of its run{load.differing}, or {AFRESH}."
        )
    if load.scheduler is None:
        return None
    return changed_flags.schedule_refusal(
        state["args"],
        args,
        (contents.schedule_of(state), load.scheduler.state_dict()),
        groups,
    )


def _is_whole(state: Mapping[str, Any], legacy: bool) -> bool:
    """Whether Megatron has read the optimizer's part, too; what it reads first lacks some of it."""
    return legacy or "model" in state or "model0" in state


def _groups(optimizer: Any, saved: Any) -> Iterator[tuple[Any, Any]]:
    """Of each of Megatron's optimizers, this run's parameter groups and the checkpoint's."""
    own = getattr(optimizer, "chained_optimizers", [optimizer])
    theirs = list(contents.optimizers_of(saved))
    for part, its in zip(own, theirs, strict=False):
        groups = contents.groups_of(its)
        if part.optimizer is not None and isinstance(groups, list):
            yield part.optimizer.param_groups, groups


def unreadable(load_dir: Any, error: BaseException) -> str:
    """Say in one sentence that a checkpoint cannot be read, and what to do."""
    if isinstance(error, CheckpointException):  # of several ranks: one of theirs
        error = next(iter(error.failures.values()))[0]
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"the checkpoint in {load_dir} cannot be read ({type(error).__name__}: {reason}); if it is "
        "truncated or not Megatron's, resume from an earlier one with --ckpt-step ITERATION, or "
        f"{AFRESH}."
    )
