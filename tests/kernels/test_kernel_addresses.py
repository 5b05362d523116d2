"""What others may change between steps, and steps that fail: kernels find all tensors anew."""

import contextlib
import itertools
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_came import CAME
from megatron_came.kernels.triton.passes import TritonBackend
from scripts.cases.kernels import weights_after_moves
from tests.support.oracle import DEVICES, on_both


@on_both
def test_state_of_another_size_is_refused(kernels):
    """Kernels read addresses, and would write beyond its end."""
    small, large = (
        CAME([torch.nn.Parameter(torch.ones(n, 4, device=DEVICES[kernels]))], lr=1e-2)
        for n in (3, 300)
    )
    for optimizer in (small, large):
        optimizer.init_state()
    large._wanted_kernels = kernels
    (param,), (other,) = (one.param_groups[0]["params"] for one in (large, small))
    large.state[param].update(small.state[other])
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"state 'exp_avg' of a parameter of shape \(300, 4\)"):
        large.step()


@on_both
def test_what_has_moved_before_a_step_that_fails_is_found_by_the_next(kernels):
    device, results = DEVICES[kernels], []
    for fails in (False, True):
        params = [torch.nn.Parameter(torch.ones(6, 4, device=device)) for _ in range(2)]
        first, second = (torch.arange(24.0, device=device).view(6, 4) ** power for power in (1, 2))
        optimizer = CAME(params, lr=1e-2, kernels=kernels)
        for grad in (first, second):
            before, params[0].grad = params[0].grad, grad.clone()
            if grad is first:
                params[1].grad = torch.empty_like(grad)
            params[1].grad.copy_(grad)  # where it was
            if fails and grad is second:
                state = optimizer.state[params[1]]
                momentum, state["exp_avg"] = state["exp_avg"], torch.zeros(1, device=device)
                with pytest.raises(ValueError, match="state 'exp_avg'"):
                    optimizer.step()
                state["exp_avg"] = momentum
            optimizer.step()
            del before  # only now may another tensor take its address
        results += params
    assert all(torch.equal(param, results[0]) for param in results)


PASSES = "megatron_came.kernels.triton.passes"
UPLOAD = "megatron_came.kernels.triton.passes.TritonBackend.upload"


@pytest.mark.parametrize("call", range(9))
def test_a_step_after_one_that_could_not_upload_its_tables(call, monkeypatch):
    """As in a CUDA graph's capture, which asks for a warm-up."""
    device, results = DEVICES["triton"], []
    for fails in (False, True):
        params = [torch.nn.Parameter(torch.ones(s, device=device)) for s in ((6, 4), (5,), (3, 4))]
        optimizer = CAME(params, lr=1e-2, kernels="triton")
        for step in range(2):
            for power, param in enumerate(params[: 2 + step], 1):  # one more in the second step
                grad = torch.arange(float(param.numel()), device=device) ** power + step
                param.grad = grad.view_as(param)
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + step)
            if fails and step:
                calls = itertools.count()

                def refuse(self, table, upload=TritonBackend.upload, calls=calls):
                    if next(calls) == call:
                        raise RuntimeError("not now")
                    return upload(self, table)

                with monkeypatch.context() as patch:
                    patch.setattr(UPLOAD, refuse)
                    with pytest.raises(RuntimeError, match="not now"):
                        optimizer.step()
            optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tables_are_copied_on_the_device_of_the_parameters(monkeypatch):
    """Simulated: two GPUs, of which the first is the current one."""
    current, seen = [torch.device("cuda", 0)], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    def pin_memory(tensor):
        seen.append(current[-1])
        return mock.Mock(to=lambda device, non_blocking: seen.append(device))

    def is_capturing():
        return seen.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    backend = TritonBackend(torch.device("cpu"))
    backend._is_cuda, backend._device = True, torch.device("cuda", 1)
    backend.upload(np.zeros(3))
    assert seen == [torch.device("cuda", 1)] * 3


def test_a_step_after_one_that_was_not_counted(monkeypatch):
    """As in a CUDA graph's capture that fails: what it has recorded is not carried out."""
    device, results = DEVICES["triton"], []
    for fails in (False, True):
        param = torch.nn.Parameter(torch.ones(6, 4, device=device))
        param.grad = torch.arange(24.0, device=device).view(6, 4)
        optimizer = CAME([param], lr=1e-2, kernels="triton", momentum_dtype=torch.bfloat16)
        for step in range(4):
            if fails and step == 2:
                with monkeypatch.context() as patch:
                    patch.setattr(f"{PASSES}.TritonPasses._count_step", lambda self: None)
                    patch.setattr(f"{PASSES}.run", mock.Mock(side_effect=RuntimeError("not now")))
                    with pytest.raises(RuntimeError, match="not now"):
                        optimizer.step()
            optimizer.step()
        results.append(optimizer.state[param]["exp_avg"])
    assert torch.equal(*results)


# What a step calls when something has changed, before it has changed anything itself.
PREPARES = {"triton": UPLOAD, "numba": "megatron_came.kernels.cpu.launch._Matrices._view"}
WRITE = "megatron_came.kernels.triton.passes.TritonBackend.write"


@on_both
@pytest.mark.parametrize("undone", ["gradient", "rate"])
def test_what_a_failed_step_has_seen_and_the_next_one_finds_undone(undone, kernels, monkeypatch):
    device, results = DEVICES[kernels], []
    for fails in (False, True):
        param = torch.nn.Parameter(torch.ones(6, 4, device=device))
        optimizer = CAME([param], lr=1e-2, kernels=kernels)
        (group,) = optimizer.param_groups
        param.grad = first = torch.arange(24.0, device=device).view(6, 4)
        optimizer.step()
        if fails:
            with monkeypatch.context() as patch:
                prepares = PREPARES[kernels]
                if (undone, kernels) == ("rate", "triton"):
                    prepares = WRITE  # one number of a table
                patch.setattr(prepares, mock.Mock(side_effect=RuntimeError("not now")))
                if undone == "gradient":
                    param.grad = second = first.square()
                else:
                    group["lr"] = 0.5
                if kernels == "numba":
                    param.data = param.data.clone()
                with pytest.raises(RuntimeError, match="not now"):
                    optimizer.step()
            param.grad, group["lr"] = first, 1e-2
            param.data = param.data.clone()  # makes it place a table
        optimizer.step()
        if fails and undone == "gradient":
            del second
        results.append(param.detach())
    assert torch.equal(*results)


@on_both
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("exp_avg", lambda value: value[:150]),
        ("exp_avg", lambda value: value.view(torch.uint8)),
        ("exp_avg", lambda value: value.t()),
        ("exp_avg_scale", lambda value: value[:1]),
        ("exp_avg_scale", None),
        ("remainder", lambda value: value[:1]),
        ("exp_avg_sq_row", None),
    ],
)
def test_state_that_changes_where_it_lies_is_refused(key, change, kernels):
    param = torch.nn.Parameter(torch.ones(300, 4, dtype=torch.bfloat16, device=DEVICES[kernels]))
    optimizer = CAME([param], lr=1e-2, kernels=kernels, momentum_dtype=torch.int8, remainders=True)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    state = optimizer.state[param]
    value = state.pop(key)
    if change is not None:
        state[key] = change(value)
    for _ in range(2):  # and not accepted for having been seen
        with pytest.raises(ValueError, match=f"state '{key}'"):
            optimizer.step()


@on_both
def test_gradients_of_any_dtype_and_layout(kernels):
    """One changes its dtype where it lies; others are copied for the step."""
    device, results = DEVICES[kernels], []
    for path in ("plain", kernels):
        params = [torch.nn.Parameter(torch.ones(20, 6, device=device)) for _ in range(4)]
        optimizer = CAME(params, lr=1e-2, kernels=path)
        memory = torch.zeros(20, 6, device=device)
        for step in range(4):
            base = torch.arange(120.0, device=device).view(20, 6) + step
            here = memory if step % 2 else memory.view(-1).view(torch.bfloat16)[:120].view(20, 6)
            here.copy_(base.sin())
            grads = base.sqrt().half(), base.view(6, 20).t(), base.cos().half(), here
            for param, grad in zip(params, grads, strict=True):
                param.decoupled_grad = grad
            optimizer.step()
        results.append(torch.stack(params))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@on_both
def test_gradients_that_stay_where_they_are_are_rounded_as_others(kernels):
    results = []
    for in_place in (False, True):
        param = torch.nn.Parameter(torch.ones(20, 6, device=DEVICES[kernels]))
        optimizer = CAME([param], lr=1e-2, kernels=kernels, momentum_dtype=torch.bfloat16)
        kept = []
        for step in range(3):
            grad = (torch.arange(120.0, device=param.device) + step).sin().view(20, 6)
            if in_place and step:
                param.grad.copy_(grad)
            else:
                param.grad = grad
            kept.append(param.grad)  # or another would take its address
            optimizer.step()
        results.append(optimizer.state[param]["exp_avg"])
    assert torch.equal(*results)


@on_both
def test_a_parameter_that_changes_its_nature_is_updated_by_another_path(kernels):
    param = torch.nn.Parameter(torch.ones(6, 4, device=DEVICES[kernels]))
    optimizer = CAME([param], lr=1e-2, kernels=kernels)
    results = []
    for change in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t.bfloat16()):
        param.data = change(torch.ones_like(param.data, dtype=torch.float32))
        optimizer.state.clear()
        param.grad = torch.arange(24.0, device=param.device).view(6, 4).to(param.dtype)
        optimizer.step()
        results.append(param.detach().float())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=2**-8, atol=0)


@on_both
def test_tensors_that_the_host_has_moved_are_found(kernels):
    moved, others = (
        weights_after_moves(kernels, DEVICES[kernels], moves) for moves in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(moved, others, strict=True))


@pytest.mark.parametrize("kernels", DEVICES)
def test_a_parameter_that_moves_to_the_next_group_has_its_rate(kernels):
    """All groups' parameters, one after another, stay the same list."""
    device = DEVICES[kernels]
    params = [torch.nn.Parameter(torch.ones(9, 8, device=device)) for _ in range(3)]
    groups = [{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "lr": 1e-1}]
    optimizer = CAME(groups, lr=1e-3, kernels=kernels)
    for step in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        if step == 0:
            before = [param.detach().clone() for param in params]
            moved = optimizer.param_groups[0]["params"].pop()
            optimizer.param_groups[1]["params"].insert(0, moved)
    changes = [(a.detach() - b).norm() for a, b in zip(params, before, strict=True)]
    torch.testing.assert_close((changes[1] / changes[0]).item(), 10.0, rtol=1e-3, atol=0.0)


def test_numba_finds_what_a_failed_step_has_left_behind(monkeypatch):
    """A gradient, a rate and weights of a step that failed before it had changed anything."""
    results = []
    for fails in (False, True):
        param = torch.nn.Parameter(torch.ones(6, 4))
        optimizer = CAME([param], lr=1e-2, kernels="numba", momentum_dtype=torch.bfloat16)
        (group,) = optimizer.param_groups
        param.grad = first = torch.arange(24.0).view(6, 4)
        optimizer.step()
        if fails:
            view = "megatron_came.kernels.cpu.launch._Matrices._view"
            with monkeypatch.context() as patch:
                patch.setattr(view, mock.Mock(side_effect=RuntimeError("not now")))
                param.data, param.grad, group["lr"] = param.data.clone(), first.square(), 0.5
                with pytest.raises(RuntimeError, match="not now"):
                    optimizer.step()
            param.grad, group["lr"] = first, 1e-2
        optimizer.step()
        results.append(torch.cat([param.detach(), optimizer.state[param]["exp_avg"].float()]))
    assert torch.equal(*results)
