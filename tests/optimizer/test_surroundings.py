"""What PyTorch, wrappers and users do around an optimizer: right, or refused in a sentence."""

import copy

import came_pytorch
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megatron_came import CAME
from tests.support.oracle import TOLERANCE, distance, gradient_history, oracle_updates

SHAPES = [(6, 5), (7,), (300, 260)]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
on_cpu_kernels = pytest.mark.parametrize("kernels", ["plain", "numba"])


def parameters(shapes=SHAPES):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def history(shape, steps):
    return gradient_history(
        shape, steps, "normal", torch.float32, torch.Generator().manual_seed(sum(shape))
    )


def step(optimizer, steps, first=0):
    """Take steps with gradients that depend on their number alone."""
    for number in range(first, first + steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = history(param.shape, number + 1)[-1]
        optimizer.step()


def assert_exact(param, start, steps, lr=1e-2):
    theirs = oracle_updates(start, history(start.shape, steps), lr=lr)[-1]
    assert distance(param.detach(), theirs, start) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.cfloat, torch.float8_e4m3fn], ids=str)
def test_a_weight_of_another_dtype_that_is_unfrozen_is_refused(dtype):
    weight = torch.nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    (other,) = parameters([(6, 5)])
    optimizer = CAME([other, weight], lr=1e-2)
    other.grad = torch.ones_like(other)
    optimizer.step()
    weight.requires_grad_(True)
    optimizer.step()  # not yet in use
    weight.grad, before = torch.ones_like(weight), other.detach().clone()
    with pytest.raises(ValueError, match=f"not of {dtype}: freeze it"):
        optimizer.step()
    assert torch.equal(other, before)


LAYOUTS = {
    "rows": lambda: torch.eye(4).to_sparse_csr(),
    "coordinates": lambda: torch.eye(4).to_sparse(),
    "mkldnn": lambda: torch.eye(4).to_mkldnn(),
    "jagged": lambda: torch.nested.nested_tensor([torch.eye(4)] * 2, layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.eye(4)] * 2),
}


@on_cpu_kernels
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_of_another_layout_is_refused_unless_it_is_frozen(name, kernels):
    with pytest.raises(ValueError, match=r"not of (torch\.\w+|nested tensors): freeze it"):
        CAME([torch.nn.Parameter(LAYOUTS[name]())], lr=1e-2, kernels=kernels)
    (other,) = parameters([(6, 5)])
    start = other.detach().clone()
    frozen = torch.nn.Parameter(LAYOUTS[name](), requires_grad=False)
    optimizer = CAME([other, frozen], lr=1e-2, kernels=kernels)
    for number in range(2):
        other.grad = history(other.shape, number + 1)[-1]
        optimizer.step()
    assert_exact(other, start, 2)


@on_cpu_kernels
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq_row", "exp_avg_res_col", "exp_avg_sq"])
def test_state_that_somebody_made_16_bit_is_refused(key, kernels):
    optimizer = CAME(parameters(), lr=1e-2, kernels=kernels)
    step(optimizer, 1)
    for state in optimizer.state.values():
        if key in state:
            state[key] = state[key].half()
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=f"CAME: state '{key}' of a parameter .*torch.float16"):
        step(optimizer, 1, first=1)
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))


@on_cpu_kernels
def test_gradients_that_a_collective_has_yet_to_bring(kernels):
    """They have no memory of their own, and each step has another at the same address, 0."""
    waited, plain = parameters(), parameters()
    for params in (waited, plain):
        optimizer = CAME(params, lr=1e-2, kernels=kernels)
        for number in range(4):
            for param in params:
                gradient = history(param.shape, number + 1)[-1]
                param.grad = AsyncCollectiveTensor(gradient) if params is waited else gradient
            optimizer.step()
    assert all(map(torch.equal, waited, plain))


def test_a_parameter_given_twice_is_refused():
    """The authors' class takes a step with each."""
    weight, other = parameters([(6, 5), (4, 3)])
    with pytest.raises(ValueError, match=r"shape \(6, 5\) is given twice"):
        CAME([weight, other, weight], lr=1e-2)
    optimizer = CAME([weight, other], lr=1e-2)
    optimizer.param_groups[0]["params"].append(weight)
    with pytest.raises(ValueError, match="given twice"):
        step(optimizer, 1)


@on_cpu_kernels
def test_lazy_parameters_are_trained_from_when_they_are_made(kernels):
    model = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Linear(8, 3))
    optimizer = CAME(model.parameters(), lr=1e-2, kernels=kernels)
    last = model[1].weight
    last.grad = torch.ones_like(last)
    optimizer.step()
    assert set(optimizer.state) == {last}
    model(torch.ones(2, 5))
    last.grad = None
    start = model[0].weight.detach().clone()
    for gradient in history((8, 5), 3):
        model[0].weight.grad = gradient
        optimizer.step()
    assert_exact(model[0].weight, start, 3)


@on_cpu_kernels
@pytest.mark.parametrize("momentum", DTYPES, ids=str)
@pytest.mark.parametrize("guard", [None, 50.0])
def test_the_default_device_is_somebody_elses(kernels, momentum, guard):
    settings = {"kernels": kernels, "momentum_dtype": momentum, "spike_guard": guard}
    weights, figures = [], []
    for device in (None, "meta"):
        params = parameters()
        torch.set_default_device(device)
        try:
            optimizer = CAME(params, lr=1e-2, **settings)
            for number in range(3):
                for param in params:
                    param.grad = torch.full_like(param, number + 1.0).div_(param.detach())
                optimizer.step()
            figures.append(optimizer.diagnostics())
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            torch.set_default_device(None)
        weights.append(params)
    assert all(map(torch.equal, *weights))
    assert figures[0] == figures[1]


@on_cpu_kernels
@pytest.mark.parametrize("momentum", DTYPES, ids=str)
def test_what_a_wrapper_keeps_among_the_state_is_left_there(kernels, momentum):
    straight, marked = parameters(), parameters()
    for params in (straight, marked):
        optimizer = CAME(params, lr=1e-2, kernels=kernels, momentum_dtype=momentum)
        if params is marked:
            optimizer.state[params[1]]["early"] = True
        step(optimizer, 2)
        if params is marked:
            for param in params:
                optimizer.state[param] |= {"count": 3, "slow": param.detach().clone()}
        step(optimizer, 2, first=2)
    assert all(map(torch.equal, straight, marked))
    assert optimizer.state[marked[0]]["count"] == 3
    assert optimizer.state_dict()["state"][0]["count"] == 3


@pytest.mark.parametrize("number", [7, torch.tensor(7.0)], ids=str)
def test_a_step_that_a_wrapper_keeps_is_no_count_of_ours(number):
    """Ours are tensors of whole numbers."""
    straight, marked = parameters(), parameters()
    for params in (straight, marked):
        optimizer = CAME(params, lr=1e-2, bias_correction=True)
        step(optimizer, 2)
        for param in params if params is marked else ():
            optimizer.state[param]["step"] = number
        step(optimizer, 3, first=2)
    assert all(map(torch.equal, straight, marked))
    assert all(state["step"] == 7 for state in optimizer.state.values())


@pytest.mark.parametrize("momentum", DTYPES, ids=str)
def test_what_a_wrapper_keeps_among_the_state_is_loaded(momentum):
    """As timm's Lookahead keeps slow weights; with a state of CAME's that lacks nothing."""
    optimizer = CAME(parameters(), lr=1e-2, momentum_dtype=momentum)
    step(optimizer, 2)
    for param in list(optimizer.state):
        optimizer.state[param] |= {"count": 3, "slow": param.detach().clone()}
    saved = copy.deepcopy(optimizer.state_dict())
    params = [param.detach().clone().requires_grad_() for param in optimizer.state]
    other = CAME(params, lr=1e-2, momentum_dtype=momentum)
    other.load_state_dict(saved)
    for mine, its in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert its["count"] == 3
        assert torch.equal(mine["slow"], its["slow"])
        assert mine["slow"] is not its["slow"]
    for each in (optimizer, other):
        step(each, 1, first=2)
    assert all(map(torch.equal, optimizer.state, params))


@on_cpu_kernels
def test_weights_that_become_a_view_of_their_negatives(kernels):
    """At the same address, where they have the other sign, in a step and back in a later one."""
    turned, plain = parameters(), parameters()
    optimizers = [CAME(params, lr=1e-2, kernels=kernels) for params in (turned, plain)]
    for param in (*turned, *plain):
        param.grad = history(param.shape, 1)[0]
    for number in range(8):
        if number % 2:
            for mine, its in zip(turned, plain, strict=True):
                mine.data = torch._neg_view(mine.data)
                its.data.neg_()
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(turned, plain, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_a_step_of_fake_tensors_computes_nothing():
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(6, 5))
        optimizer = CAME([weight], lr=1e-2)
        for _ in range(2):
            weight.grad = torch.empty(6, 5)
            optimizer.step()
    assert optimizer.state[weight]["exp_avg"].shape == (6, 5)


@pytest.mark.parametrize("momentum", DTYPES, ids=str)
def test_hooks_may_give_a_state_dictionary_other_keys(momentum):
    optimizer = CAME(parameters(), lr=1e-2, momentum_dtype=momentum)
    step(optimizer, 1)
    plain = optimizer.state_dict()["state"]
    optimizer.register_state_dict_post_hook(
        lambda _, found: {**found, "state": {f"n{k}": v for k, v in found["state"].items()}}
    )
    named = optimizer.state_dict()["state"]
    assert set(named) == {"n0", "n1", "n2"}
    assert named["n2"].keys() == plain[2].keys()
    assert named["n2"]["exp_avg"].dtype == plain[2]["exp_avg"].dtype != torch.int8


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("momentum", DTYPES, ids=str)
def test_pytorchs_named_state_dictionaries(momentum, is_flat):
    model = torch.nn.Linear(300, 7)
    optimizer = CAME(model.parameters(), lr=1e-2, momentum_dtype=momentum)
    step(optimizer, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = copy.deepcopy(model)
    other = CAME(twin.parameters(), lr=0.5, momentum_dtype=momentum)
    set_optimizer_state_dict(twin, other, saved, options=options)
    step(optimizer, 1, first=3)
    step(other, 1, first=3)
    assert other.param_groups[0]["step"] == 4
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-7 if momentum != torch.int8 else 1e-3)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_pytorchs_named_state_dictionaries_know_no_group_without_parameters(place):
    model = torch.nn.Linear(30, 7)
    optimizers = []
    for each in (model, copy.deepcopy(model)):
        groups = [{"params": each.weight, "lr": 1e-2}, {"params": each.bias, "lr": 1e-3}]
        groups.insert(place, {"params": [], "lr": 0.5, "betas": (0.8, 0.9, 0.9)})
        optimizers.append((each, CAME(groups, lr=1e-2)))
    step(optimizers[0][1], 3)
    saved = copy.deepcopy(get_optimizer_state_dict(*optimizers[0]))
    set_optimizer_state_dict(*optimizers[1], saved)
    optimizers[1][0].load_state_dict(model.state_dict())
    for _, optimizer in optimizers:
        assert optimizer.param_groups[place]["lr"] == 0.5
        assert optimizer.param_groups[place]["betas"] == (0.8, 0.9, 0.9)
        step(optimizer, 1, first=3)
    weights = [[*each.parameters()] for each, _ in optimizers]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("empty", [(5, 0), (0, 5), (2, 0, 3), (0,)], ids=str)
def test_the_authors_state_of_a_parameter_without_elements(empty):
    """Its means of no elements are NaN."""
    theirs = parameters([(6, 5), empty])
    oracle = came_pytorch.CAME(theirs, lr=1e-2)
    step(oracle, 2)
    ours = [torch.nn.Parameter(param.detach().clone()) for param in theirs]
    optimizer = CAME(ours, lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    step(optimizer, 2, first=2)
    assert_exact(ours[0], parameters([(6, 5)])[0].detach(), 4)
    CAME(ours).load_state_dict(optimizer.state_dict())
