"""What stands in a checkpoint beside its tensors: damage is found before anything goes by it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_came.checkpoint_files.errors import shown
from megatron_came.megatron.checkpoints.factors import FORMAT, unknown_format

AFRESH = "give --no-load-optim or --finetune to start it afresh from the checkpoint's weights"

# Keys of the scheduler's state, with the names that old releases of Megatron gave them.
SCHEDULE = {
    "max_lr": ("max_lr", "start_lr"),
    "min_lr": ("min_lr",),
    "lr_warmup_steps": ("lr_warmup_steps", "warmup_steps", "warmup_iter"),
    "lr_decay_steps": ("lr_decay_steps", "decay_steps", "end_iter"),
    "lr_decay_style": ("lr_decay_style", "decay_style"),
    "start_wd": ("start_wd",),
    "end_wd": ("end_wd",),
    "wd_incr_steps": ("wd_incr_steps",),
    "wd_incr_style": ("wd_incr_style",),
}
_STEPS_TAKEN = ("num_steps", "num_iters")
_SAMPLES = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
# Hyperparameters of a parameter group, and how many numbers each is.
_NUMBERS = {"lr": 1, "weight_decay": 1, "betas": 3, "eps": 2, "clip_threshold": 1}


def damaged(what: str, folder: Any = None) -> str:
    """Say in one sentence what of a checkpoint is damaged, and what to do."""
    if what.startswith("the checkpoint"):  # another version's, and not damaged
        return what
    where = f" in {folder}" if folder is not None else ""
    return (
        f"the checkpoint{where} is damaged or not Megatron's: {what.rstrip('.')}; resume from "
        f"another one with --ckpt-step ITERATION, or {AFRESH}."
    )


def progress_problem(state: Mapping[str, Any]) -> str | None:
    """Say what is wrong with what a checkpoint says of how far its run was, or None."""
    iteration = state.get("iteration", state.get("total_iters"))  # as old releases have it
    if not _is_count(iteration):
        return f"its iteration is {_shown(iteration)}, and not a number of iterations"
    if state.get("args") is None:
        return "the arguments of its run are missing"
    for name in _SAMPLES:
        value = getattr(state["args"], name, 0)
        if not _is_count(value):
            return f"its {name} is {_shown(value)}, and not a number of samples"
    return None


def sharding_of(state: Mapping[str, Any]) -> Any:
    """The format of the distributed optimizer's state in a checkpoint, None if it has none."""
    return (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")


def schedule_of(state: Mapping[str, Any]) -> Any:
    """The scheduler's state among what a checkpoint holds."""
    return state.get("lr_scheduler", state.get("opt_param_scheduler"))


def schedule_problem(state: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a checkpoint's schedule of learning rate and weight decay, or None."""
    schedule = schedule_of(state)
    if not isinstance(schedule, Mapping):
        return f"its schedule (opt_param_scheduler) is {_shown(schedule)}"
    for names in (*SCHEDULE.values(), _STEPS_TAKEN):
        value = first_of(schedule, names)
        if value is None and names[0].startswith(("start_wd", "end_wd", "wd_", "lr_decay_style")):
            continue  # not written by old releases
        is_name = names[0].endswith("_style")
        if not (isinstance(value, str) if is_name else _is_number(value) and value >= 0):
            what = "a name" if is_name else "a number"
            return f"its schedule has {names[0]} {_shown(value)}, and not {what}"
    return None


def first_of(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of several names that is there, or None."""
    return next((values[name] for name in names if name in values), None)


def optimizers_of(saved: Any) -> Iterator[Any]:
    """What a checkpoint holds of each of Megatron's optimizers (dense parameters, experts)."""
    # Megatron's chain saves a list with --ckpt-format torch, otherwise a dictionary by number.
    if isinstance(saved, list) and saved:
        yield from saved
    elif isinstance(saved, Mapping) and saved and all(isinstance(key, int) for key in saved):
        yield from (saved[key] for key in sorted(saved))
    else:
        yield saved


def groups_of(optimizer: Any) -> Any:
    """The parameter groups in what a checkpoint holds of one optimizer; None if there are none."""
    if not isinstance(optimizer, Mapping):
        return None
    inner = optimizer.get("optimizer", optimizer)  # FP32Optimizer has nothing around it
    return inner.get("param_groups") if isinstance(inner, Mapping) else None


def optimizer_problem(saved: Any) -> str | None:
    """Say what is wrong with a checkpoint's "optimizer" beside tensors, or None."""
    for optimizer in optimizers_of(saved):
        if not isinstance(optimizer, Mapping):
            return f"its optimizer is {_shown(optimizer)}, and not a dictionary"
        if not optimizer:  # of a rank without parameters
            continue
        problem = _groups_problem(groups_of(optimizer))
        if problem is None and "came" in optimizer:
            problem = factors_problem(optimizer["came"])
        if problem is not None:
            return problem
    return None


def _groups_problem(groups: Any) -> str | None:
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return f"its param_groups are {_shown(groups)}, and not a list of dictionaries"
    for group in groups:
        if not _is_count(group.get("step")):
            return f"its param_groups have step {_shown(group.get('step'))}, and not a number"
        for name in filter(group.__contains__, _NUMBERS):  # what is missing is this run's
            value, count = group[name], _NUMBERS[name]
            numbers = [value] if count == 1 else value
            is_right = isinstance(numbers, list | tuple) and len(numbers) == count
            if not is_right or not all(map(_is_number, numbers)):
                what = "a number" if count == 1 else f"{count} numbers"
                return f"its param_groups have {name} {_shown(value)}, and not {what}"
    steps = sorted({int(group["step"]) for group in groups})
    if len(steps) > 1:
        return f"its param_groups have different numbers of steps, {', '.join(map(str, steps))}"
    return None


def factors_problem(factors: Any) -> str | None:
    """Say what is wrong with the entry of CAME's factors, or None; their tensors are not read."""
    if not isinstance(factors, Mapping):
        return f"its factors of CAME are {_shown(factors)}, and not a dictionary"
    if type(factors.get("format")) is not int or factors["format"] != FORMAT:
        return unknown_format(factors.get("format"))
    parameters = factors.get("parameters")
    if not isinstance(parameters, Mapping | list):
        return f"its factors of CAME are those of parameters {_shown(parameters)}"
    entries = parameters.values() if isinstance(parameters, Mapping) else parameters
    if not all(isinstance(entry, Mapping) for entry in entries):
        return "its factors of CAME are not dictionaries by parameter"
    return None


def _is_count(value: Any) -> bool:
    """Whether something is a number of steps, written as Megatron writes it."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "missing" if value is None else shown(value)
