"""Steps of which nothing has changed: what they cost in Python, and that a change is seen."""

import gc
import sys
import time
import weakref

import pytest
import torch

from megatron_came import CAME
from megatron_came.kernels.triton.passes import TritonBackend
from megatron_came.snapshots import Snapshot
from tests.support.oracle import DEVICES

RUN = "megatron_came.kernels.triton.passes.run"


def parameters(count, device="cpu"):
    """As many vectors as matrices, with gradients."""
    params = [
        torch.nn.Parameter(torch.ones((8,) if number % 2 else (8, 8), device=device))
        for number in range(count)
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def groups(params):
    return [
        {"params": params[::2], "weight_decay": 0.1},
        {"params": params[1::2], "weight_decay": 0.0},
    ]


def python_calls(function):
    """How many functions Python calls, those of C included."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_parameter_costs_no_call_but_the_look_at_its_gradient(monkeypatch):
    """Launches on a GPU are stubbed."""
    monkeypatch.setattr(RUN, lambda *arguments: None)
    calls = []
    for count in (20, 220):
        optimizer = CAME(groups(parameters(count, DEVICES["triton"])), lr=1e-3, kernels="triton")
        for _ in range(3):
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3
        calls.append(python_calls(optimizer.step))
    assert calls[1] - calls[0] <= 220 - 20


@pytest.mark.alone
@pytest.mark.parametrize("count", [292, 2019])
def test_python_takes_less_than_it_does_in_fused_adamw(count, monkeypatch):
    """Launches are stubbed in both; 292 parameters are GPT-2 Medium's."""
    device = DEVICES["triton"]
    monkeypatch.setattr(RUN, lambda *arguments: None)
    adamw = torch.optim.AdamW(groups(parameters(count, device)), lr=1e-3, fused=True)
    came = CAME(groups(parameters(count, device)), lr=1e-3, kernels="triton")
    adamw.step()  # makes its state
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *arguments, **more: None)
    least = {adamw: float("inf"), came: float("inf")}
    gc.disable()
    try:
        for step in range(40):  # in turns, so that what else goes on slows both
            for optimizer in least:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 / (step + 1)
                begin = time.perf_counter()
                optimizer.step()
                least[optimizer] = min(least[optimizer], time.perf_counter() - begin)
    finally:
        gc.enable()
    assert least[came] <= 0.7 * least[adamw]


@pytest.mark.parametrize("kernels", DEVICES)
def test_nothing_of_a_step_is_held(kernels):
    """Gradients that are set to None, and state that a host has put elsewhere, are freed."""
    params = parameters(2, DEVICES[kernels])
    optimizer = CAME(params, lr=1e-3, kernels=kernels)
    for _ in range(3):
        optimizer.step()
    held = [weakref.ref(param.grad) for param in params]
    for param in params:
        state = optimizer.state[param]
        held += map(weakref.ref, state.values())
        for key, value in state.items():
            state[key] = value.clone()
        param.grad = None
    del state, value
    assert [each() for each in held] == [None] * len(held)


def other_view(tensor):
    """Another tensor, at the same address."""
    return tensor.view(tensor.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda params, grads, states, weights: params[0].set_(params[0].clone()),
        lambda params, grads, states, weights: params[0].t_(),
        lambda params, grads, states, weights: params[0].resize_(2, 8),
        lambda params, grads, states, weights: grads.__setitem__(0, grads[0].clone()),
        lambda params, grads, states, weights: grads.__setitem__(0, grads[0].view(torch.int32)),
        lambda params, grads, states, weights: grads.__setitem__(0, grads[0][:2]),
        lambda params, grads, states, weights: grads.__setitem__(1, None),
        lambda params, grads, states, weights: grads.reverse(),
        lambda params, grads, states, weights: states["b"].update(x=other_view(states["b"]["x"])),
        lambda params, grads, states, weights: states["b"]["x"].set_(torch.ones(4, 4)),
        lambda params, grads, states, weights: states["b"].pop("y"),
        lambda params, grads, states, weights: states["b"].update(z=states["b"].pop("y")),
        lambda params, grads, states, weights: states.update(a=states.pop("a")),
        lambda params, grads, states, weights: weights.__setitem__(0, weights[0].clone()),
    ],
)
def test_a_change_is_seen(change):
    def some():
        return [torch.ones(4, 4) for _ in range(3)]

    params, grads, weights = some(), some(), some()
    states = {name: {"x": torch.ones(4, 4), "y": torch.ones(4)} for name in "ab"}
    now = Snapshot.of(params, grads, states, weights)
    seen = now.let_go()
    assert seen.has_become(Snapshot.of(params, grads, states, weights))
    # At whatever address what comes next may lie.
    kept = params[:], grads[:], states.copy(), weights[:]
    change(params, grads, states, weights)
    assert not seen.has_become(Snapshot.of(params, grads, states, weights))
    del kept


def test_state_that_is_gone_is_not_what_came_to_lie_there():
    states = {"a": {"x": torch.ones(4, 4)}}
    seen = Snapshot.of([], [], states, []).let_go()
    (address,) = (states["a"]["x"].data_ptr(),)
    for _ in range(100):  # until it has the same address, and perhaps the same id
        states["a"]["x"] = None
        states["a"]["x"] = torch.ones(16)
        if states["a"]["x"].data_ptr() == address:
            break
    assert not seen.has_become(Snapshot.of([], [], states, []))


@pytest.mark.parametrize("strange", [1, torch.ones(3, 3).to_sparse()])
def test_what_is_no_tensor_in_memory_is_looked_at_each_time(strange):
    assert Snapshot.of([], [], {"a": {"x": strange}}, []) is None


def test_a_rate_is_written_into_the_table_without_another_table(monkeypatch):
    device, results = DEVICES["triton"], []
    for kernels in ("triton", "plain"):
        optimizer = CAME(groups(parameters(4, device)), lr=1e-3, kernels=kernels)
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(TritonBackend, "upload", lambda *arguments: pytest.fail("a table"))
            for step in range(3):
                for number, group in enumerate(optimizer.param_groups):
                    group["lr"], group["weight_decay"] = 1e-2 / (step + 1), 0.3 * number
                optimizer.step()
        results.append(torch.cat([p.view(-1) for g in optimizer.param_groups for p in g["params"]]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)
