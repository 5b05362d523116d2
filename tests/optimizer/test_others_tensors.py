"""Parameters that overlap or wrap their values, and state that others take away, cast or turn."""

import copy

import came_pytorch
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

from megatron_came import CAME
from megatron_came.core.spike_guard import SpikeGuard
from tests.support.oracle import DEVICES, TOLERANCE, distance, oracle_updates, with_all_kernels
from tests.support.oracle import gradient_history as gradients_of_kind

on_cpu_kernels = pytest.mark.parametrize("kernels", ["plain", "numba"])


def gradients(shape=(6, 5), steps=4):
    generator = torch.Generator().manual_seed(3)
    return gradients_of_kind(shape, steps, "normal", torch.float32, generator)


def parameter(values):
    return torch.nn.Parameter(values)


def assert_exact(found, start, history, **settings):
    theirs = oracle_updates(start.double(), [g.double() for g in history], lr=1e-2, **settings)[-1]
    assert distance(found.detach(), theirs, start) <= TOLERANCE[torch.float32]


OVERLAPPING = {
    "expanded": lambda: torch.ones(1, 5).expand(6, 5),
    "windows": lambda: torch.arange(10.0).as_strided((6, 5), (1, 1)),
    "rows": lambda: torch.arange(30.0).as_strided((6, 5), (4, 1)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_elements_that_overlap_are_refused_unless_they_are_frozen(name):
    with pytest.raises(ValueError, match=r"elements of .* overlap in memory"):
        CAME([parameter(OVERLAPPING[name]())], lr=1e-2)
    other = parameter(torch.ones(6, 5))
    frozen = parameter(OVERLAPPING[name]()).requires_grad_(False)
    optimizer = CAME([frozen, other], lr=1e-2)
    other.grad = torch.ones(6, 5)
    optimizer.step()
    frozen.requires_grad_(True).grad = torch.ones(6, 5)
    before = other.detach().clone()
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.step()
    assert torch.equal(other, before)
    frozen.grad = None
    other.grad, other.data = None, OVERLAPPING[name]()
    other.grad = torch.ones(6, 5)
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.step()


@on_cpu_kernels
def test_elements_with_others_between_them_are_trained(kernels):
    whole = torch.full((8, 20), 9.0)
    own = whole[1:7, 2:12:2]
    start = torch.randn(6, 5)
    param, history = parameter(own.copy_(start)), gradients()
    optimizer = CAME([param], lr=1e-2, kernels=kernels)
    for param.grad in history:
        optimizer.step()
    assert_exact(own, start, history)
    own.fill_(9.0)
    assert (whole == 9.0).all()


class Wrapper(torch.Tensor):
    """Keeps one plain tensor, as torchao's for training in fp8 do, and unwraps results."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner, self.scale = inner, torch.ones(())

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self):
        return ["inner", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, Wrapper) else value

        out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return cls(out) if function is torch.ops.aten.detach.default else out


class Quantized(Wrapper):
    """Keeps its values in another dtype, and computes with copies."""

    def __init__(self, values):
        self.inner, self.scale = values.to(torch.float16), torch.ones(())

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner.float() if isinstance(value, Quantized) else value

        out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return cls(out) if function is torch.ops.aten.detach.default else out


WRONG = {
    "two": lambda values: TwoTensor(values, values.clone()),
    "masked": lambda values: masked_tensor(values, values > -9),
    "quantized": Quantized,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@on_cpu_kernels
@pytest.mark.parametrize("name", WRONG)
def test_wrapped_values_that_a_step_would_not_change_are_refused(name, kernels):
    wrapped, other = parameter(WRONG[name](torch.randn(6, 5))), parameter(torch.randn(6, 5))
    start, history = other.detach().clone(), gradients()
    wrapped.requires_grad_(False)
    optimizer = CAME([wrapped, other], lr=1e-2, kernels=kernels)
    for other.grad in history:
        optimizer.step()
    assert set(optimizer.state) == {other}
    assert_exact(other, start, history)
    wrapped.requires_grad_(True)
    wrapped.grad, before = WRONG[name](torch.ones(6, 5)), other.detach().clone()
    with pytest.raises(ValueError, match=r"is a \w+, which does not keep its values in one plain"):
        optimizer.step()
    assert torch.equal(other, before)


@on_cpu_kernels
def test_wrapped_values_in_one_plain_tensor_are_trained(kernels):
    start, history = torch.randn(6, 5), gradients()
    param = parameter(Wrapper(start.clone()))
    optimizer = CAME([param], lr=1e-2, kernels=kernels)
    for param.grad in history:
        optimizer.step()
    assert_exact(param.detach().inner, start, history)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_state_that_torchs_own_loading_has_cast_is_refused(momentum, weights):
    """As nanotron loads it; in the codes of int8 it would be as many times too large."""
    params = [parameter(torch.ones(6, 5, dtype=weights)) for _ in range(2)]
    saved, optimizer = (CAME([each], lr=1e-2, momentum_dtype=momentum) for each in params)
    for each in (saved, optimizer):
        each.param_groups[0]["params"][0].grad = torch.ones(6, 5, dtype=weights)
        each.step()
    for state_dict in (saved.state_dict(), torch.optim.Optimizer.state_dict(saved)):
        before = repr(optimizer.state_dict())
        if momentum == weights == torch.float32:
            torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
        else:
            with pytest.raises(ValueError, match="has cast it; call the optimizer's own load_"):
                torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
        assert repr(optimizer.state_dict()) == before


@on_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_remainders_of_weights_that_are_no_longer_bf16_are_refused(dtype, kernels):
    model = torch.nn.Linear(5, 6).bfloat16()
    optimizer = CAME(model.parameters(), lr=1e-2, remainders=True, kernels=kernels)
    for is_turned in (False, True):
        if is_turned:
            model.zero_grad()
            model.to(dtype)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        before = [param.detach().clone() for param in model.parameters()]
        if not is_turned:
            optimizer.step()
    with pytest.raises(ValueError, match=f"is {dtype}, and its state 'remainder' completes bf16"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


HOW = {
    "clear": lambda state, param: state.clear(),
    "one": lambda state, param: state.pop(param, None),
}


@with_all_kernels
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("guard", [None, 50.0])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_state_that_is_taken_away_begins_anew(at, guard, how, kernels):
    """Where nothing else changes, gradients at one address least of all."""
    start, history = [torch.randn(6, 5), torch.randn(7)], [gradients(), gradients((7,))]
    ours = [parameter(values.to(DEVICES[kernels], copy=True)) for values in start]
    theirs = [parameter(values.double()) for values in start]
    optimizer = CAME(ours, lr=1e-2, kernels=kernels, spike_guard=guard)
    oracle = came_pytorch.CAME(theirs, lr=1e-2)
    buffers = [torch.empty_like(param) for param in ours]
    for number in range(4):
        held = [dict(state) for state in optimizer.state.values()]  # or the fault would crash
        if number == at:
            HOW[how](optimizer.state, ours[1])
            HOW[how](oracle.state, theirs[1])
        for mine, its, of, buffer in zip(ours, theirs, history, buffers, strict=True):
            if number or mine is ours[0]:  # the other begins a step later
                mine.grad, its.grad = buffer.copy_(of[number]), of[number].double()
        optimizer.step()
        oracle.step()
    del held
    for mine, its, begin in zip(ours, theirs, start, strict=True):
        assert distance(mine.detach().cpu(), its.detach(), begin) <= TOLERANCE[torch.float32]


@on_cpu_kernels
def test_a_guard_that_is_set_later_skips_all_of_a_step(kernels):
    param, history = parameter(torch.randn(6, 5)), gradients(steps=40)
    optimizer = CAME([param], lr=1e-2, kernels=kernels)
    for number, gradient in enumerate(history):
        if number == 3:
            optimizer.spike_guard = SpikeGuard(3.0, print)
        param.grad = gradient * (1e6 if number == 39 else 1.0)
        before = param.detach().clone(), copy.deepcopy(optimizer.state[param])
        optimizer.step()
    assert optimizer.spike_guard.skipped == 1
    assert torch.equal(param, before[0])
    assert repr(optimizer.state[param]) == repr(before[1])


def test_a_checkpoint_without_counts_of_steps_goes_on_with_bias_correction():
    """Which is set after loading: before, PyTorch would ask the checkpoint for the counts."""
    torch.manual_seed(1)
    whole = torch.nn.Linear(5, 6)
    halves = [copy.deepcopy(whole) for _ in range(2)]
    optimizers = [CAME(each.parameters(), lr=1e-2) for each in (whole, *halves)]

    def step(model, optimizer, numbers):
        for number in numbers:
            for param in model.parameters():
                param.grad = gradients(param.shape, number + 1)[-1]
            optimizer.step()

    step(whole, optimizers[0], range(3))
    step(halves[0], optimizers[1], range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(halves[0], optimizers[1]))
    assert not any("step" in state for state in saved["state"].values())
    halves[1].load_state_dict(halves[0].state_dict())
    set_optimizer_state_dict(halves[1], optimizers[2], saved)
    for optimizer in (optimizers[0], optimizers[2]):
        optimizer.param_groups[0]["bias_correction"] = True
    step(whole, optimizers[0], range(3, 5))
    step(halves[1], optimizers[2], range(3, 5))
    assert all(map(torch.equal, whole.parameters(), halves[1].parameters()))
    assert all(state["step"] == 5 for state in optimizers[2].state.values())
