"""CAME without shards in place of the authors' class."""

import copy
import io
import math
from collections import UserList

import came_pytorch
import pytest
import torch

from megatron_came import CAME
from tests.support.oracle import (
    BETAS,
    DEVICES,
    KINDS,
    TOLERANCE,
    distance,
    gradient_history,
    on_every_path,
    oracle_updates,
    with_all_kernels,
)

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
SHAPES = [(), (1,), (300,), (1, 5), (5, 1), (48, 80), (4, 33, 7), (2, 3, 5, 6), (700, 900)]


def train(optimizer, param, gradients):
    for gradient in gradients:
        param.grad = None if gradient is None else gradient.clone().to(param.device)
        optimizer.step()


def random_history(shape, kind="normal", steps=12, dtype=torch.float32, seed=0):
    return gradient_history(shape, steps, kind, dtype, torch.Generator().manual_seed(seed))


@on_every_path
@pytest.mark.parametrize("betas", BETAS, ids=["default", "llama"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_numbers(shape, kind, betas, dtype, kernels):
    if kind == "huge" and math.prod(shape) > 10_000:
        pytest.skip("the authors' fp32 sums overflow")
    start = torch.randn(shape, dtype=dtype)
    history = random_history(shape, kind, dtype=dtype)
    param = torch.nn.Parameter(start.clone().to(DEVICES[kernels]))
    train(CAME([param], betas=betas, kernels=kernels, **SETTINGS), param, history)
    theirs = oracle_updates(start, history, betas=betas, **SETTINGS)[-1]
    assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[dtype]


@with_all_kernels
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_threshold": 0.3},
        {"clip_threshold": 50.0},
        {"eps": (1e-8, 1e-3)},
        {"betas": (0.0, 0.9, 0.0)},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_same_numbers_with_other_settings(settings, kernels):
    start, history = torch.randn(30, 20), random_history((30, 20))
    param = torch.nn.Parameter(start.clone().to(DEVICES[kernels]))
    settings = {**SETTINGS, **settings}
    train(CAME([param], kernels=kernels, **settings), param, history)
    theirs = oracle_updates(start, history, **settings)[-1]
    assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[torch.float32]


@with_all_kernels
def test_gradients_of_1e18_in_long_rows_do_not_overflow(kernels):
    start, history = torch.randn(3, 4000), random_history((3, 4000), "huge", steps=3)
    param = torch.nn.Parameter(start.clone().to(DEVICES[kernels]))
    train(CAME([param], kernels=kernels, **SETTINGS), param, history)
    theirs = oracle_updates(start.double(), [g.double() for g in history], **SETTINGS)[-1]
    assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[torch.float32]


@with_all_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (50,)], ids=str)
def test_sixteen_bit_parameters(dtype, shape, kernels):
    device = DEVICES[kernels]
    start = torch.randn(shape).to(dtype)
    history = [g.to(dtype) for g in random_history(shape)]
    param = torch.nn.Parameter(start.clone().to(device))
    optimizer = CAME([param], kernels=kernels, **SETTINGS)
    train(optimizer, param, history)
    assert {v.dtype for v in optimizer.state[param].values()} == {torch.float32}
    updates = oracle_updates(start, history, **SETTINGS)
    # fp32 rounding may tip a 16-bit weight over, seldom and by one unit in the last place, of the
    # size that the weight had then; the weight may be nearer to zero in the end.
    largest = torch.stack([start, *updates]).abs().amax(0).double()
    difference = (param.detach().cpu().double() - updates[-1].double()).abs()
    assert (difference <= torch.finfo(dtype).eps * largest).all()
    assert (difference > 0).double().mean() < 0.01


@with_all_kernels
def test_missing_gradients_are_skipped(kernels):
    device = DEVICES[kernels]
    start = torch.randn(6, 5)
    history = random_history((6, 5))
    history[0] = history[4] = history[5] = None
    param = torch.nn.Parameter(start.clone().to(device))
    optimizer = CAME([param], kernels=kernels, **SETTINGS)
    optimizer.step()
    assert not optimizer.state_dict()["state"]
    train(optimizer, param, history)
    theirs = oracle_updates(start, history, **SETTINGS)[-1]
    assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[torch.float32]


@with_all_kernels
def test_zero_gradients_and_empty_parameters_stay_finite(kernels):
    device = DEVICES[kernels]
    params = [
        torch.nn.Parameter(torch.randn(shape, device=device))
        for shape in [(4, 5), (7,), (0, 5), (0,)]
    ]
    optimizer = CAME(params, lr=1e-2, kernels=kernels)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert all(torch.isfinite(p).all() for p in params)
    assert all(torch.isfinite(v).all() for s in state.values() for v in s.values())


@with_all_kernels
def test_parameter_groups(kernels):
    device = DEVICES[kernels]
    starts = [torch.randn(6, 5), torch.randn(9), torch.randn(4, 3)]
    histories = [random_history(tuple(s.shape), seed=i) for i, s in enumerate(starts)]
    settings = [{"lr": 1e-2}, {"lr": 3e-3, "weight_decay": 0.2}, {"lr": 1e-2, "betas": BETAS[1]}]
    params = [torch.nn.Parameter(s.clone().to(device)) for s in starts]
    groups = [{"params": [p], **s} for p, s in zip(params, settings, strict=True)]
    optimizer = CAME(groups[:2], lr=1.0, kernels=kernels)
    optimizer.add_param_group(groups[2])
    for step in range(12):
        for param, history in zip(params, histories, strict=True):
            param.grad = history[step].clone().to(device)
        optimizer.step()
    for param, start, history, setting in zip(params, starts, histories, settings, strict=True):
        theirs = oracle_updates(start, history, **setting)[-1]
        assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[torch.float32]


@with_all_kernels
def test_groups_added_after_steps_and_schedules_are_followed(kernels):
    device = DEVICES[kernels]
    first, second = (torch.nn.Parameter(torch.randn(s, device=device)) for s in ((6, 5), (4,)))
    optimizer = CAME([first], lr=0.1, kernels=kernels)
    first.grad = torch.randn_like(first)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    optimizer.param_groups[0]["lr"] = 0.0
    before, other = first.detach().clone(), second.detach().clone()
    first.grad, second.grad = torch.randn_like(first), torch.randn_like(second)
    optimizer.step()
    assert torch.equal(first, before)
    assert not torch.equal(second, other)


@with_all_kernels
def test_a_schedule_may_miss_zero_by_rounding(kernels):
    """The last rate of LinearLR may be -4e-19."""
    start, history = torch.randn(6, 5), random_history((6, 5), steps=8)
    params = [torch.nn.Parameter(start.clone().to(DEVICES[kernels])) for _ in range(2)]
    optimizers = CAME([params[0]], lr=1e-2, kernels=kernels), came_pytorch.CAME([params[1]], 1e-2)
    for optimizer, param in zip(optimizers, params, strict=True):
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 7)
        for gradient in history:
            train(optimizer, param, [gradient])
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
    assert -1e-18 < rate < 0.0
    assert distance(*params, start.to(DEVICES[kernels])) <= TOLERANCE[torch.float32]
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    optimizers[0].param_groups[0]["lr"] = -1e-9
    with pytest.raises(ValueError, match="at least 0"):
        optimizers[0].step()


def test_lists_of_a_configuration_are_taken_for_tuples():
    """OmegaConf's are no lists of Python's."""
    betas, eps = UserList([0.8, 0.99, 0.999]), UserList([1e-30, 1e-16])
    (group,) = CAME([torch.nn.Parameter(torch.ones(2, 2))], betas=betas, eps=eps).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.99, 0.999), (1e-30, 1e-16))
    with pytest.raises(ValueError, match="eps = b'ab' is not allowed"):
        CAME([torch.nn.Parameter(torch.ones(2, 2))], eps=b"ab")


def test_closure():
    param = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = CAME([param], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


@with_all_kernels
def test_non_contiguous_parameters_and_gradients(kernels):
    device = DEVICES[kernels]
    start = torch.randn(5, 8).t()
    history = random_history((8, 5))
    param = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format).to(device))
    assert not param.is_contiguous()
    train(
        CAME([param], kernels=kernels, **SETTINGS), param, [g.t().contiguous().t() for g in history]
    )
    theirs = oracle_updates(start.contiguous(), history, **SETTINGS)[-1]
    assert distance(param.detach().cpu(), theirs, start) <= TOLERANCE[torch.float32]


@with_all_kernels
@pytest.mark.parametrize("shape", [(), (1,), (48, 80)], ids=str)
@pytest.mark.parametrize("what", ["gradient", "every other gradient", "weight"])
def test_signs_that_are_not_in_memory_yet(what, shape, kernels):
    start, history = torch.randn(shape), random_history(shape, steps=4)
    weight = start.clone().to(DEVICES[kernels])
    param = torch.nn.Parameter(torch._neg_view(-weight) if what == "weight" else weight)
    optimizer = CAME([param], kernels=kernels, **SETTINGS)
    memory = torch.empty_like(weight)
    for number, gradient in enumerate(history):
        is_lazy = what == "gradient" or (what == "every other gradient" and number % 2)
        memory.copy_(-gradient if is_lazy else gradient)  # at one address in all steps
        param.grad = torch._neg_view(memory) if is_lazy else memory
        optimizer.step()
    theirs = oracle_updates(start, history, **SETTINGS)[-1]
    found = param.detach().cpu().resolve_neg()
    assert distance(found, theirs, start) <= TOLERANCE[torch.float32]


@with_all_kernels
def test_gradients_of_an_imaginary_part(kernels):
    """Autograd gives a scalar one whose sign is not in memory."""
    param = torch.nn.Parameter(torch.tensor(0.5, device=DEVICES[kernels]))
    one = torch.ones_like(param)
    (torch.complex(one, param).conj() * one).imag.backward()
    assert param.grad is not None
    assert param.grad.is_neg()
    assert param.grad.item() == -1.0
    CAME([param], kernels=kernels, lr=1e-2).step()
    assert param.item() > 0.5


@with_all_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_state_dict_round_trip_is_bit_identical(dtype, kernels):
    device = DEVICES[kernels]
    history = [g.to(dtype) for g in random_history((6, 5))]
    straight = torch.nn.Parameter(torch.randn(6, 5).to(device, dtype))
    resumed = torch.nn.Parameter(straight.detach().clone())
    train(CAME([straight], kernels=kernels, **SETTINGS), straight, history)
    first = CAME([resumed], kernels=kernels, **SETTINGS)
    train(first, resumed, history[:6])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = CAME([resumed], lr=5.0, kernels=kernels)
    second.load_state_dict(torch.load(file))
    train(second, resumed, history[6:])
    assert torch.equal(straight, resumed)
    assert second.param_groups[0]["step"] == 12


@with_all_kernels
@pytest.mark.parametrize("shape", [(6, 5), (7,)], ids=str)
def test_state_of_the_authors_class_can_be_loaded(shape, kernels):
    device = DEVICES[kernels]
    history = random_history(shape)
    theirs = torch.nn.Parameter(torch.randn(shape))
    start = theirs.detach().clone()
    oracle = came_pytorch.CAME([theirs], **SETTINGS)
    train(oracle, theirs, history[:6])
    ours = torch.nn.Parameter(theirs.detach().clone().to(device))
    optimizer = CAME([ours], kernels=kernels, **SETTINGS)
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    train(oracle, theirs, history[6:])
    train(optimizer, ours, history[6:])
    assert distance(ours.detach().cpu(), theirs.detach(), start) <= TOLERANCE[torch.float32]


def test_copies_of_an_unsharded_optimizer_go_on_alone():
    param = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = CAME([param], lr=1e-2)
    train(optimizer, param, random_history((4, 3), steps=2))
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    train(optimizer, param, random_history((4, 3), steps=2))
    train(twin, other, random_history((4, 3), steps=2))
    assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": None}, "lr = None"),
        ({"lr": math.nan}, "lr = nan"),
        ({"betas": (1.0, 0.9, 0.9)}, r"beta1 = 1.0 .* in \[0, 1\)"),
        ({"betas": (0.9, -0.1, 0.9)}, "beta2 = -0.1"),
        ({"betas": (0.9, 0.9)}, "betas = .* a tuple of 3 numbers"),
        ({"eps": (0.0, 1e-16)}, "eps1 = 0.0 .* above 0"),
        ({"eps": (1e-30, math.inf)}, "eps2 = inf"),
        ({"clip_threshold": 0}, "clip_threshold = 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused(settings, message):
    param = torch.nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=message):
        CAME([param], **{"lr": 1e-3, **settings})
    with pytest.raises(ValueError, match=message):
        CAME([{"params": [param], **settings}], lr=1e-3)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="complex64"):
        CAME([torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))], lr=1e-3)
    param = torch.nn.Parameter(torch.randn(3, 2))
    param.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        CAME([param], lr=1e-3).step()
