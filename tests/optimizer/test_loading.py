"""State dictionaries that are not this optimizer's are refused before anything is changed."""

import copy
import math
import re

import came_pytorch
import numpy as np
import pytest
import torch

from megatron_came import CAME


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_refused(optimizer, state_dict, message):
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.compile(rf"^CAME: .*{message}", re.DOTALL)):
        optimizer.load_state_dict(state_dict)
    after = snapshot(optimizer)
    assert repr(before) == repr(after)
    step(optimizer)


OTHERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "SGD without momentum": lambda params: torch.optim.SGD(params, lr=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-3),
    "LBFGS": lambda params: torch.optim.SGD(params, lr=1e-3, nesterov=True, momentum=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("steps", [0, 1])
def test_other_optimizers(name, steps):
    other = OTHERS[name](parameters())
    for _ in range(steps):
        step(other)
    optimizer = step(CAME(parameters(), lr=1e-2))
    assert_refused(
        optimizer, other.state_dict(), "belongs to another optimizer; start CAME without"
    )


def test_another_optimizers_state_in_our_groups():
    other = step(torch.optim.AdamW(parameters(), lr=1e-3)).state_dict()
    optimizer = step(CAME(parameters(), lr=1e-2))
    mixed = {"state": other["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    assert_refused(optimizer, mixed, "has the keys .* belongs to another optimizer")
    for state in mixed["state"].values():
        state["max_exp_avg_sq"] = state["exp_avg"]
    assert_refused(optimizer, mixed, "'max_exp_avg_sq', which CAME has not")
    lion = {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": mixed["param_groups"]}
    assert_refused(optimizer, lion, "has the keys 'exp_avg' where CAME has")


@pytest.mark.parametrize("thing", [None, [], "x", 3, {}, {"state": {}}], ids=repr)
def test_what_is_no_state_dictionary(thing):
    assert_refused(CAME(parameters(), lr=1e-2), thing, "has the keys 'state' and 'param_groups'")


def damage(path, value):
    def change(state):
        *way, last = path
        for key in way:
            state = state[key]
        state[last] = value

    return change


def remove(*path):
    def change(state):
        *way, last = path
        for key in way:
            state = state[key]
        del state[last]

    return change


DAMAGES = {
    "betas of two": (damage(("param_groups", 0, "betas"), (0.9, 0.9)), "tuple of 3 numbers"),
    "betas of text": (damage(("param_groups", 0, "betas"), "x"), "tuple of 3 numbers"),
    "a beta of text": (
        damage(("param_groups", 0, "betas"), ("0.9", 0.9, 0.9)),
        "beta1 in parameter group 0 of",
    ),
    "eps": (damage(("param_groups", 0, "eps"), 1e-8), "eps in parameter group 0 of the state"),
    "lr of text": (damage(("param_groups", 0, "lr"), "1e-3"), "lr in parameter group 0 of"),
    "lr NaN": (damage(("param_groups", 0, "lr"), float("nan")), "lr in"),
    "no lr": (remove("param_groups", 0, "lr"), "has no 'lr'"),
    "step of text": (damage(("param_groups", 0, "step"), "8"), "step in .* = '8'"),
    "no step": (damage(("param_groups", 0, "step"), None), "step in .* = None"),
    "negative step": (damage(("param_groups", 0, "step"), -3), "step in .* = -3"),
    "half a step": (damage(("param_groups", 0, "step"), 1.5), "step in .* = 1.5"),
    "a float step": (damage(("param_groups", 0, "step"), 8.0), "step in .* = 8.0"),
    "a step in fp32": (damage(("param_groups", 0, "step"), torch.tensor(8.0)), "step in .* = tens"),
    "groups": (damage(("param_groups",), {}), "must be a list of dictionaries"),
    "a group": (damage(("param_groups", 0), []), "must be a dictionary with a list 'params'"),
    "params": (damage(("param_groups", 0, "params"), None), "must be a dictionary with a list"),
    "fewer params": (damage(("param_groups", 0, "params"), [0]), r"\[1\] parameters, .* \[2\]"),
    "more groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), r"\[2, 2\]"),
    "state": (damage(("state",), []), "'state' of the state dictionary must be a dictionary"),
    "a state": (damage(("state", 0), [1, 2]), "of parameter 0 must be a dictionary"),
    "a state of nobody": (damage(("state", 9), {}), "of a parameter 9 that its"),
    "a list": (damage(("state", 0, "exp_avg"), [0.0]), "must be a tensor, not this list"),
    "no momentum": (remove("state", 0, "exp_avg"), "has the keys"),
    "no factor": (remove("state", 0, "exp_avg_res_col"), "has the keys"),
    "a vector's": (lambda s: s["state"].update({0: s["state"][1]}), "has the keys"),
    "another shape": (
        damage(("state", 0, "exp_avg_sq_row"), torch.zeros(3)),
        r"has the shape \(3,\) in the state dictionary, not \(4,\)",
    ),
    "turned": (damage(("state", 0, "exp_avg"), torch.zeros(3, 4)), r"has the shape \(3, 4\)"),
    "integers": (
        damage(("state", 0, "exp_avg_sq_row"), torch.zeros(4, dtype=torch.int64)),
        "which CAME does not write",
    ),
    "NaN": (
        damage(("state", 0, "exp_avg_res_row"), torch.tensor([1, math.nan, 1, 1])),
        "holds a NaN",
    ),
    "an infinity": (damage(("state", 1, "exp_avg"), torch.full((5,), math.inf)), "or an infinity"),
    "a negative square": (damage(("state", 1, "exp_avg_sq"), -torch.ones(5)), "a negative number"),
    "a negative factor": (
        damage(("state", 0, "exp_avg_sq_col"), torch.tensor([1, 1, -1e-20])),
        "'exp_avg_sq_col' of .* holds a negative number",
    ),
    "a sparse one": (
        damage(("state", 0, "exp_avg"), torch.eye(4, 3).to_sparse()),
        "is torch.sparse",
    ),
    "a meta one": (
        damage(("state", 1, "exp_avg"), torch.empty(5, device="meta")),
        "is a meta tensor",
    ),
    "int8 without scale": (
        damage(("state", 0, "exp_avg"), torch.zeros(4, 3, dtype=torch.int8)),
        "which CAME does not write",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_ones(name):
    change, message = DAMAGES[name]
    optimizer = step(CAME(parameters(), lr=1e-2))
    state = snapshot(optimizer)
    change(state)
    assert_refused(optimizer, state, message)


def test_another_way_to_see_convolutions_is_refused():
    def convolution(**settings):
        return step(CAME([torch.nn.Parameter(torch.ones(6, 4, 3, 3))], lr=1e-2, **settings))

    flat, authors = convolution(flat_convolutions=True), convolution()
    assert_refused(flat, snapshot(authors), "another flat_convolutions")
    assert_refused(authors, snapshot(flat), "another flat_convolutions")
    flat.load_state_dict(snapshot(flat))


def test_hooks_see_and_change_what_is_loaded():
    optimizer, other = step(CAME(parameters(), lr=1e-2)), step(CAME(parameters(), lr=3e-2))

    def unwrap(_, state_dict):
        return state_dict["wrapped"]

    handle = optimizer.register_load_state_dict_pre_hook(unwrap)
    optimizer.load_state_dict({"wrapped": other.state_dict()})
    handle.remove()
    assert optimizer.param_groups[0]["lr"] == 3e-2
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_hooks_see_and_change_what_was_loaded():
    optimizer = step(CAME(parameters(), lr=1e-2))
    saved = snapshot(optimizer)

    def forget_momentum(loaded):
        for state in loaded.state.values():
            state["exp_avg"].zero_()

    optimizer.register_load_state_dict_post_hook(forget_momentum)
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == 2
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("momentum", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("guard", [None, 50.0])
@pytest.mark.parametrize("value", [3, {"count": 3.0}, {"step": 7, "scale": torch.ones(2)}], ids=str)
def test_what_a_wrapper_keeps_of_no_parameter_is_saved_and_loaded(value, guard, momentum):
    """As pytorch_optimizer's TRAC does: state has its own name there."""
    settings = {"lr": 1e-2, "spike_guard": guard, "momentum_dtype": momentum}
    plain, optimizer, other = (CAME(parameters(), **settings) for _ in range(3))
    optimizer.state["wrapper"] = value
    step(step(optimizer))
    other.load_state_dict(snapshot(optimizer))
    assert repr(other.state["wrapper"]) == repr(value)
    step(step(plain))
    assert other.param_groups[0]["step"] == 2
    mine = plain.state_dict()["state"]
    assert repr([other.state_dict()["state"][place] for place in mine]) == repr([*mine.values()])
    step(other)
    saved = snapshot(plain)
    saved["state"]["0"] = saved["state"].pop(0)
    assert_refused(plain, saved, "state of a parameter '0' that its parameter groups do not list")


def test_numbers_of_a_schedule_in_numpy_go_through_a_file(tmp_path):
    optimizer = step(CAME(parameters(), lr=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5))
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert saved["param_groups"][0]["lr"] == schedule.get_last_lr()[0] == 5e-3


def test_the_authors_state_with_its_own_keys_is_taken():
    theirs = step(came_pytorch.CAME(parameters(), lr=1e-2))
    theirs.state["wrapper"] = {"step": 9}  # of its own
    optimizer = CAME(parameters(), lr=1e-3)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["step"] == 1
    for param in optimizer.param_groups[0]["params"]:
        assert not {"step", "RMS"} & optimizer.state[param].keys()
    step(optimizer)


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_every_dtype_goes_through_a_file(momentum, tmp_path):
    optimizer = step(CAME(parameters(), lr=1e-2, momentum_dtype=momentum))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    for wanted in (torch.float32, torch.bfloat16, torch.int8):
        other = CAME(parameters(), lr=1e-2, momentum_dtype=wanted)
        other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert {s["exp_avg"].dtype for s in other.state.values()} == {wanted}
        step(other)


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_momentum_that_is_not_contiguous_is_loaded(momentum):
    """The authors' class lays it out like the first gradient, which may be transposed."""
    param = torch.nn.Parameter(torch.zeros(4, 3))
    authors = came_pytorch.CAME([param], lr=1e-3)
    param.grad = torch.randn(3, 4).t()
    authors.step()
    saved = authors.state_dict()
    assert not saved["state"][0]["exp_avg"].is_contiguous()
    loaded = []
    for momentum_in_order in (False, True):
        if momentum_in_order:
            saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].contiguous()
        optimizer = CAME([param], momentum_dtype=momentum)
        optimizer.load_state_dict(saved)
        loaded.append(optimizer.state_dict()["state"][0]["exp_avg"])
    assert loaded[0].any()
    assert torch.equal(*loaded)


def test_a_step_that_is_a_tensor_counts_as_a_number():
    """Bias correction takes powers of it."""
    results = []
    for kind in (int, torch.tensor):
        params = parameters()
        optimizer = step(CAME(params, lr=1e-2, bias_correction=True))
        saved = snapshot(optimizer)
        saved["param_groups"][0]["step"] = kind(1000)
        optimizer.load_state_dict(saved)
        step(optimizer)
        results.append(torch.cat([param.detach().flatten() for param in params]))
    assert torch.equal(*results)


def test_the_same_names_in_another_order_are_refused():
    named = [(name, torch.nn.Parameter(torch.ones(4, 3))) for name in ("first", "second")]
    saved = step(CAME(named, lr=1e-2)).state_dict()
    turned = step(CAME(named[::-1], lr=1e-2))
    assert_refused(turned, saved, "has 'first' where this optimizer has 'second'.*in the order")
    two_groups = [{"params": [pair]} for pair in named[::-1]]
    saved_groups = step(CAME([{"params": [pair]} for pair in named], lr=1e-2)).state_dict()
    assert_refused(step(CAME(two_groups, lr=1e-2)), saved_groups, "has 'first' where")
    # Other names may be a wrapper's, around the same parameters.
    wrapped = CAME([(f"module.{name}", param) for name, param in named], lr=1e-2)
    wrapped.load_state_dict(saved)
    CAME([param for _, param in named], lr=1e-2).load_state_dict(saved)


def test_a_step_that_megatrons_wrappers_put_in_for_adam_is_left_out():
    """A float; CAME's own counts are whole numbers."""
    optimizer = step(CAME(parameters(), lr=1e-2, bias_correction=True))
    saved = snapshot(optimizer)
    for state in saved["state"].values():
        state["step"] = torch.tensor(0.0)
    optimizer.load_state_dict(saved)
    assert not any("step" in state for state in optimizer.state.values())
    saved["state"][1]["step"] = torch.tensor(-2)
    assert_refused(optimizer, saved, "step in the state of parameter 1 of the state dictionary")
