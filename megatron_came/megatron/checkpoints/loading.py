"""Checks while Megatron loads a checkpoint: a run that cannot resume as its flags say ends.

Megatron reads what a distributed checkpoint holds beside tensors (and of a ``torch`` one all), then
the tensors, and loads both into model, optimizer and schedule. Before and after each reading, all
ranks agree whether one of them has found a problem, so that they end together.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.megatron.checkpoints import (
    contents,
    flags,
    folders,
    megatron_fsdp,
    shifted,
    tensors,
)
from megatron_came.megatron.checkpoints.contents import AFRESH
from megatron_came.megatron.checkpoints.digests.verifying import note_files, verified
from megatron_came.megatron.checkpoints.groups import Groups, same_order
from megatron_came.megatron.checkpoints.refusals import bucket_refusal, refusal
from megatron_came.megatron.checkpoints.under_way import Load, current
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.run import run_args
from megatron_came.megatron.sharding import chain_of
from megatron_came.patching import Function
from megatron_came.voice import end_if, is_of_lost_rank, rank, say_once, stop


def with_sentences(
    original: Function, ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Verify what is loaded, and end all ranks with one sentence where a load fails."""
    run = run_args()
    try:
        with verified(ddp_model, optimizer, run):
            if optimizer is None:
                return original(ddp_model, optimizer, *args, **kwargs)
            return _checked(original, run, ddp_model, optimizer, *args, **kwargs)
    except RuntimeError as error:
        if run.optimizer != "came" or not is_of_lost_rank(error):
            raise
        stop("another rank ended while the checkpoint was loaded, and says why.", error)
    finally:
        folders.layout_of.cache_clear()


def _checked(
    original: Function,
    run: Any,
    ddp_model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    own_rates = bool(run.override_opt_param_scheduler)
    load = Load(ddp_model, optimizer, opt_param_scheduler, own_rates)
    if run.optimizer == "came" and kwargs.get("skip_load_to_model_and_opt"):
        # Of FSDP2's checkpoints Megatron fills the tensors in place and leaves it at that: the
        # steps of groups are none, nor is momentum in the dtype of a checkpoint.
        kwargs["skip_load_to_model_and_opt"] = False
    token = current.set(load)
    try:
        result = original(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
    except (UnsupportedError, dist.DistError):
        raise  # the checkpoint is not to blame
    except SystemExit as end:  # Megatron's, with status 0, where it misses something
        if run.optimizer != "came" or end.code or load.is_finished:
            raise
        stop(
            f"the checkpoint in {load.folder or run.load} lacks what Megatron needs to resume "
            "(see the line above): without random states give --no-load-rng, otherwise resume "
            f"from another one with --ckpt-step ITERATION, or {AFRESH}."
        )
    except Exception as error:
        if run.optimizer != "came" or is_of_lost_rank(error):
            raise
        folder = load.folder or getattr(run, "pretrained_checkpoint", None) or run.load
        problem = _out_of_memory(folder, error) or folders.misread(folder, run, opening=True)
        stop(problem or _unreadable(folder, error), error)
    finally:
        current.reset(token)
    if run.optimizer == "came":
        _after(opt_param_scheduler, result[0], run)
    return result


def _after(scheduler: Any, iteration: int, args: Any) -> None:
    if iteration and scheduler is not None:
        # Megatron sets weight decay before it has loaded its schedule.
        scheduler.step(0)
    if args.train_iters and iteration >= args.train_iters and not args.skip_train:
        say_once(
            f"the checkpoint is at iteration {iteration}, and --train-iters {args.train_iters} "
            "leaves nothing to train."
        )


def asking_for_all(original: Function, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Ask a checkpoint for all that it has, whatever this run is going to save.

    Megatron makes what it asks for as it makes what it saves, and would leave out the same.
    """
    load = current.get()
    if args.optimizer != "came" or load is None:
        return original(args, *rest, **kwargs)
    everything = copy.copy(args)
    everything.no_save_optim = everything.no_save_rng = None
    return _agreed(lambda: original(everything, *rest, **kwargs), load, args)


def with_checks(original: Function, load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Check what Megatron is going to read, and what it has read."""
    of_rank_0 = bool(kwargs.get("rank0", rest and rest[0]))
    sharded_state = kwargs.get("sharded_state_dict")

    def read() -> Any:
        result = original(load_dir, args, *rest, **kwargs)
        if args.optimizer == "came" and _format_of(result) == "FSDP_DTENSOR":
            layout = folders.layout_of(str(result[1]))
            megatron_fsdp.complete(result[0], layout, sharded_state)
        return result

    load = current.get()
    if args.optimizer != "came":
        result = read()
        if load is not None:
            _check_for_others(load_dir, result, args)
    elif load is None and dist.is_initialized():  # a model without an optimizer
        result = read()
    elif load is None:  # --use-checkpoint-args
        result = _read(read, Load([], None, None), load_dir, args)
    else:
        load.asked = None if sharded_state is None else tensors.asked_for(sharded_state)
        result = _read(read, load, load_dir, args)
        if result[0] is None:
            _say_if_elsewhere(load_dir, args)
        else:
            _check(load, result, args, of_rank_0)
    note_files(result, folders.folder_to_load(load_dir, args), first_look=of_rank_0)
    return result


def agreed(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Have all ranks end where one of them cannot read: Megatron lets the others wait for it."""
    load = current.get()
    if load is None:  # perhaps with a Megatron without a training loop
        return original(*args, **kwargs)
    settings = run_args()
    if settings.optimizer != "came":
        return original(*args, **kwargs)
    return _agreed(lambda: original(*args, **kwargs), load, settings)


def _agreed(step: Callable[[], Any], load: Load, args: Any) -> Any:
    """Take a step of a load that all ranks take, and end on all where one cannot; a collective."""
    result = problem = None
    try:
        result = step()
    except UnsupportedError as error:  # the checkpoint is not to blame
        problem = str(error)
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        problem = _reason(load, error, args)
    end_if(problem)
    return result


def _read(read: Callable[[], Any], load: Load, load_dir: Any, args: Any) -> Any:
    """Let Megatron read a checkpoint, and stop with a sentence where a rank cannot."""
    problem = folders.folder_problem(load_dir, args) or folders.missing_file(load_dir, args)
    if problem is None and rank() == 0:  # before Megatron runs what stands in it
        problem = folders.misread(load_dir, args)
    end_if(problem)
    load.folder = load_dir
    result: Any = None
    cause: BaseException | None = None
    try:
        result = read()
    except SystemExit as end:
        nothing_there = not args.ckpt_step and folders.tracked(load_dir) is None
        if end.code or (args.exit_on_missing_checkpoint and nothing_there):
            load.is_finished = True
            raise
        cause = OSError("Megatron could not load its file")
        problem = folders.misread(load_dir, args, opening=True) or _unreadable(load_dir, cause)
    except (Exception, CheckpointException) as error:
        problem, cause = _reason(load, error, args), error
    # With an error other than of a file, ranks that exchange what they read may be waiting for it.
    exchanges = getattr(args, "ckpt_fully_parallel_load", False)
    if problem is not None and exchanges and not isinstance(cause, OSError):
        stop(problem, cause)
    end_if(problem)
    return result


def _format_of(result: Any) -> str | None:
    """The format of what Megatron has read, by the name of its CheckpointType."""
    return getattr(result[3], "name", None)


def _say_if_elsewhere(load_dir: Any, args: Any) -> None:
    """Say that there is nothing to resume from, unless it is where a first start will save."""
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if load_dir is not None and load_dir != args.save and not pretrained:
        say_once(
            f"--load {load_dir} holds no checkpoint, so training starts from scratch: give "
            "--exit-on-missing-checkpoint to end such a run."
        )


def _check_for_others(load_dir: Any, result: Any, args: Any) -> None:
    """Warn of shifted state, and refuse CAME's, where another optimizer loads a checkpoint."""
    state, _, is_release, _ = result
    shifted.note(load_dir, state or {}, args)
    if state and state.get("args") is not None and not is_release:
        problem = refusal(state["args"], args, None)
        if problem:
            stop(problem)


def _check(load: Load, result: Any, args: Any, of_rank_0: bool) -> None:
    """Stop on all ranks, if one of them cannot resume from what Megatron has read.

    ``of_rank_0`` says whether every rank has read what rank 0 saved, to know its settings.
    """
    state, path, is_release, _ = result
    legacy = _format_of(result) == "LEGACY"
    resumes = not (is_release or args.finetune)
    with_optimizer = resumes and not args.no_load_optim
    saved: Any = state.get("args")
    load.saved = saved
    notices: list[str] = []
    load.differing = "" if saved is None else flags.differences(saved, args)
    problem = _problem(load, state, args, legacy, with_optimizer) if resumes else None
    if problem is None and legacy and not of_rank_0:
        problem, notices = tensors.of_legacy(load, state, resumes=with_optimizer)
    if problem is None and with_optimizer and not (legacy and of_rank_0):
        problem = _settings_problem(load, state, args, legacy)
        if problem is None and legacy:
            problem = folders.missing_file(load.folder, args, load.optimizer)
    end_if(problem)  # before tensors are compared, for which all ranks are needed
    # Of LOCAL each rank has its own file, of FSDP_DTENSOR they were compared before.
    if load.asked is not None and _format_of(result) not in ("LOCAL", "FSDP_DTENSOR"):
        notices = tensors.stop_if_misfit(load, load.asked, path, resumes=with_optimizer)
    if saved is not None and not of_rank_0:
        notices += _said(state, args, resumes=resumes, with_optimizer=with_optimizer)
    for notice in notices:
        say_once(notice)


def _said(
    state: Mapping[str, Any], args: Any, *, resumes: bool, with_optimizer: bool
) -> Iterator[str]:
    """Say in sentences what this run does otherwise than the one that saved."""
    saved = state["args"]
    if not resumes:
        yield from flags.said_model_changes(saved, args)
        return
    if with_optimizer:
        yield from flags.conversions(saved, args)
    else:
        yield flags.afresh(state.get("iteration"))
    yield from flags.said_changes(saved, args, has_schedule=with_optimizer)


def _problem(
    load: Load, state: Mapping[str, Any], args: Any, legacy: bool, with_optimizer: bool
) -> str | None:
    """Say in one sentence what is damaged beside tensors, or refused by flags, or None."""
    damage = contents.progress_problem(state)
    if damage is None:
        saved = state["args"]
        sharding = "legacy" if legacy else contents.sharding_of(state)
        problem = flags.model_refusal(saved, args) or refusal(saved, args, sharding)
        if problem:
            return problem
        if with_optimizer and sharding == "dp_reshardable":
            load.other_buckets = bucket_refusal(load.folder, saved, args)
    if damage is None and with_optimizer:
        damage = contents.schedule_problem(state)
        # What Megatron reads first of a distributed checkpoint lacks some of the optimizer's.
        is_whole = legacy or "model" in state or "model0" in state
        if damage is None and is_whole:
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
    schedules = contents.schedule_of(state), load.scheduler.state_dict()
    return flags.schedule_refusal(state["args"], args, schedules, groups)


def _groups(optimizer: Any, saved: Any) -> Iterator[tuple[Groups, Groups]]:
    """Of each of Megatron's optimizers, this run's parameter groups and the checkpoint's."""
    own = chain_of(optimizer)
    # Another number of optimizers has been refused before: see refusals._experts_apart.
    for wrapper, its in zip(own, contents.optimizers_of(saved), strict=False):
        groups = contents.groups_of(its)
        if wrapper.optimizer is not None and isinstance(groups, list):
            yield wrapper.optimizer.param_groups, groups


def _reason(load: Load, error: BaseException, args: Any) -> str:
    """Say in one sentence why Megatron could not read a checkpoint; no other rank takes part."""
    errors = [error]
    if isinstance(error, CheckpointException):
        errors += [failure[0] for failure in error.failures.values()]  # beside stack traces
    if problem := next(filter(None, (_out_of_memory(load.folder, each) for each in errors)), None):
        return problem
    if load.other_buckets and any("bucket_idx" in str(each) for each in errors):
        return load.other_buckets
    if load.asked is not None:
        try:
            folder = folders.name_of(load.folder, args, return_base_dir=True)
            problem = tensors.misfit(load.asked, folders.shapes_in(folder), load.differing)
        except (CheckpointError, OSError, TypeError, ValueError):
            pass  # that it is unreadable is said below
    problem = problem or folders.misread(load.folder, args, opening=True)
    return problem or _of_flags(load.folder, error, args) or _unreadable(load.folder, error)


def _out_of_memory(load_dir: Any, error: BaseException) -> str | None:
    """Say in one sentence that memory ran out, if so; a CPU's allocator raises a RuntimeError."""
    said = re.search("an(no|')t allocate memory", str(error))  # the system's words, or PyTorch's
    if not said and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    return (
        f"rank {rank()} ran out of memory while the checkpoint in {load_dir} was loaded "
        f"({_first_line(error)}): give it more, or share the model among more ranks."
    )


def _of_flags(load_dir: Any, error: BaseException, args: Any) -> str | None:
    """Say in one sentence that a flag, and not the checkpoint, is why Megatron reads it not."""
    if "load from a distributed checkpoint" in str(error):  # in Megatron's words
        return (
            f"the checkpoint in {load_dir} is of --ckpt-format torch_dist, this run has "
            f"--ckpt-format {args.ckpt_format}: give --ckpt-format torch_dist."
        )
    if "Integrity manifest not found" in str(error):
        return (
            f"--verify-integrity: the checkpoint in {load_dir} was saved without that: leave it "
            "out; CAME's own digests are compared all the same."
        )
    strictness = getattr(args, "dist_ckpt_strictness", "")
    if "Some keys found in the checkpoint" in str(error) and strictness.startswith("raise"):
        return (
            f"--dist-ckpt-strictness {strictness} refuses the checkpoint in {load_dir}, since this "
            "run does not read all that is in it (Megatron's own loop does not): leave it out, or "
            "give log_all."
        )
    return None


def _unreadable(load_dir: Any, error: BaseException) -> str:
    """Say in one sentence that a checkpoint cannot be read, and what to do."""
    if isinstance(error, CheckpointException):  # of several ranks: one of theirs
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, CheckpointError):
        return str(error)
    return (
        f"the checkpoint in {load_dir} cannot be read ({_first_line(error)}); if it is "
        "truncated or not Megatron's, resume from an earlier one with --ckpt-step ITERATION, or "
        f"{AFRESH}."
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
