"""Damage in what a checkpoint holds beside tensors."""

import copy
from types import SimpleNamespace

import pytest
import torch

from megatron_came.megatron.checkpoints import contents as contents
from megatron_came.megatron.checkpoints.factors import place_in

GROUP = {
    "step": 8,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "betas": (0.9, 0.999, 0.9999),
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
}
CAME = {"format": 1, "parameters": {"0": {}}}
SCHEDULE = {
    "max_lr": 1e-3,
    "min_lr": 0.0,
    "lr_warmup_steps": 8,
    "num_steps": 64,
    "lr_decay_steps": 640,
    "lr_decay_style": "cosine",
    "start_wd": 0.1,
    "end_wd": 0.1,
    "wd_incr_steps": 640,
    "wd_incr_style": "constant",
}
# Megatron's shapes: one optimizer in fp32, one of another wrapper, several.
SHAPES = [
    lambda groups: {"state": {}, "param_groups": groups, "came": dict(CAME)},
    lambda groups: {"optimizer": {"param_groups": groups}, "came": dict(CAME)},
    lambda groups: {0: {"optimizer": {"param_groups": []}}, 1: {"param_groups": groups}},
    lambda groups: [{}, {"optimizer": {"param_groups": groups}}],
]


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_optimizers_are_no_problem(shape):
    assert contents.optimizer_problem(shape([dict(GROUP), dict(GROUP)])) is None
    assert contents.optimizer_problem(shape([{"step": 0}])) is None
    on_device = {**GROUP, "lr": torch.tensor(1e-3)}
    assert contents.optimizer_problem(shape([on_device])) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("step", value) for value in (None, "8", -1, 8.5, True, [8])),
        *(("betas", value) for value in ("x", "xyz", (0.9, 0.9), None, (0.9, 0.9, "0.9"), 0.9)),
        *(("eps", value) for value in (None, "ab", (1e-30,), (1e-30, float("nan")))),
        *(("lr", value) for value in (None, "1e-3", float("inf"), (1e-3,))),
        *(("weight_decay", value) for value in ("a", float("nan"))),
        ("clip_threshold", {}),
    ],
)
def test_hyperparameters_that_are_no_numbers(shape, key, value):
    problem = contents.optimizer_problem(shape([dict(GROUP), {**GROUP, key: value}]))
    assert f"its param_groups have {key} " in problem


@pytest.mark.parametrize("value", [None, "x", [None], [1], {"0": GROUP}])
def test_parameter_groups_that_are_none(value):
    assert "its param_groups are" in contents.optimizer_problem({"param_groups": value})


@pytest.mark.parametrize("value", [None, "x", [], 3])
def test_optimizers_that_are_none(value):
    assert "its optimizer is" in contents.optimizer_problem(value)


def test_groups_with_unlike_steps():
    problem = contents.optimizer_problem({"param_groups": [GROUP, {**GROUP, "step": 99}]})
    assert "different numbers of steps, 8, 99" in problem


@pytest.mark.parametrize(
    ("came", "said"),
    [
        ([], "are [], and not a dictionary"),
        ({}, "in format None"),
        ({**CAME, "format": 2}, "in format 2"),
        ({**CAME, "format": "1"}, "in format '1'"),
        ({**CAME, "format": True}, "in format True"),
        ({**CAME, "parameters": None}, "parameters missing"),
        ({**CAME, "parameters": "0"}, "parameters '0'"),
        ({**CAME, "parameters": [None]}, "not dictionaries by parameter"),
    ],
)
def test_factors_that_are_none(came, said):
    assert said in contents.factors_problem(came)
    assert contents.factors_problem(CAME) is None


def state(**changes):
    run = SimpleNamespace(consumed_train_samples=64)
    return {"iteration": 8, "args": run, "opt_param_scheduler": dict(SCHEDULE), **changes}


@pytest.mark.parametrize("iteration", [None, -3, "8", 8.0, True])
def test_iterations_that_are_none(iteration):
    assert "its iteration is" in contents.progress_problem(state(iteration=iteration))


def test_progress_of_whole_checkpoints():
    assert contents.progress_problem(state()) is None
    assert contents.progress_problem({"total_iters": 3, "args": SimpleNamespace()}) is None
    assert "arguments" in contents.progress_problem(state(args=None))
    odd = SimpleNamespace(consumed_train_samples="x")
    assert "consumed_train_samples" in contents.progress_problem(state(args=odd))


@pytest.mark.parametrize("key", SCHEDULE)
def test_schedules_with_a_value_that_is_none_of_its_kind(key):
    broken = copy.deepcopy(state())
    broken["opt_param_scheduler"][key] = ["x"]
    assert f"its schedule has {key} ['x']" in contents.schedule_problem(broken)


def test_whole_schedules():
    assert contents.schedule_problem(state()) is None
    old = {key: value for key, value in SCHEDULE.items() if "wd" not in key}
    assert contents.schedule_problem({"lr_scheduler": old}) is None
    assert "missing" in contents.schedule_problem({})


@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0)])
def test_a_parameter_without_elements_has_a_place(shape):
    param = torch.nn.Parameter(torch.empty(shape))
    assert place_in(param.detach(), param) == tuple(slice(0, size) for size in shape)
