"""Checkpoints that are damaged beside their tensors, as a run reads them."""

import contextlib
from unittest import mock


def _optimizers(state):
    """What a checkpoint holds of the optimizer, where it has been read."""
    optimizer = state.get("optimizer")
    return [optimizer] if isinstance(optimizer, dict) else []


def _groups(state):
    for optimizer in _optimizers(state):
        groups = optimizer.get("optimizer", optimizer).get("param_groups")
        yield from groups or ()


def _group(key, value):
    def spoil(state):
        for group in _groups(state):
            group[key] = value

    return spoil


def _came(key, value):
    def spoil(state):
        for optimizer in _optimizers(state):
            if "came" in optimizer:
                optimizer["came"][key] = value

    return spoil


def _factors(value):
    def spoil(state):
        for optimizer in _optimizers(state):
            optimizer["came"] = value

    return spoil


def _set(key, value):
    return lambda state: state.update({key: value})


def _gone(key):
    return lambda state: state.pop(key, None)


def _in(key, name, value):
    def spoil(state):
        if isinstance(state[key], dict):
            state[key][name] = value
        else:
            setattr(state[key], name, value)

    return spoil


# By name: what is done to the state that Megatron has read, and what is said of it.
DAMAGE = {
    "step-none": (_group("step", None), "step missing"),
    "step-text": (_group("step", "8"), "step '8'"),
    "betas-text": (_group("betas", "x"), "betas 'x'"),
    "betas-two": (_group("betas", (0.9, 0.99)), "betas (0.9, 0.99)"),
    "eps-none": (_group("eps", None), "eps missing"),
    "lr-nan": (_group("lr", float("nan")), "lr nan"),
    "decay-text": (_group("weight_decay", "a"), "weight_decay 'a'"),
    "format-2": (_came("format", 2), "in format 2"),
    "format-text": (_came("format", "1"), "in format '1'"),
    "factors-list": (_factors([]), "factors of CAME are []"),
    "parameters-none": (_came("parameters", None), "parameters missing"),
    "iteration-gone": (_gone("iteration"), "iteration is missing"),
    "iteration-negative": (_set("iteration", -3), "iteration is -3"),
    "iteration-text": (_set("iteration", "4"), "iteration is '4'"),
    "args-gone": (_gone("args"), "arguments of its run are missing"),
    "samples-text": (_in("args", "consumed_train_samples", "x"), "consumed_train_samples is 'x'"),
    "schedule-gone": (_gone("opt_param_scheduler"), "opt_param_scheduler) is missing"),
    "rate-none": (_in("opt_param_scheduler", "max_lr", None), "max_lr missing"),
    "random-gone": (_gone("rng_state"), "give --no-load-rng"),
    "optimizer-gone": (_gone("optimizer"), "its optimizer is missing"),
    "optimizer-list": (_set("optimizer", []), "its optimizer is []"),
}


@contextlib.contextmanager
def damaged(name):
    """Let Megatron read checkpoints, of either format, damaged."""
    from megatron.training import checkpointing

    spoil = DAMAGE[name][0]
    distributed, legacy = checkpointing._load_global_dist_base_checkpoint, checkpointing.torch.load

    def read_distributed(*args, **kwargs):
        state, *rest = distributed(*args, **kwargs)
        spoil(state)
        return (state, *rest)

    def read_legacy(file, *args, **kwargs):
        state = legacy(file, *args, **kwargs)
        if "model_optim_rng" in str(file):
            spoil(state)
        elif str(name).startswith(("format", "factors", "parameters")):
            spoil({"optimizer": state})
        return state

    with (
        mock.patch.object(checkpointing, "_load_global_dist_base_checkpoint", read_distributed),
        mock.patch.object(checkpointing.torch, "load", read_legacy),
    ):
        yield
