"""Copies and pickles of a whole optimizer go on as the optimizer does."""

import copy
import io
import pickle

import pytest
import torch

from megatron_came import CAME, Shard
from tests.support.oracle import DEVICES, with_all_kernels

SMALL = {"momentum_dtype": torch.int8, "remainders": True, "seed": 7}


def saved_and_loaded(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, pickled])


def model_and_optimizer(kernels, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.LayerNorm(20))
    model = model.to(DEVICES[kernels], dtype)
    groups = [{"params": [p], "lr": 1e-2 / (1 + p.dim())} for p in model.parameters()]
    return model, CAME(groups, lr=1e-2, kernels=kernels, **settings)


def train(pair, steps, seed):
    model, optimizer = pair
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.device, param.dtype)
        optimizer.step()


def assert_same(pair, other):
    for one, two in zip(pair[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(one, two)
        state, copied = pair[1].state[one], other[1].state[two]
        assert state.keys() == copied.keys()
        for key, value in state.items():
            assert value.dtype == copied[key].dtype
            assert torch.equal(value, copied[key])


@COPIES
@with_all_kernels
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.float32, {"momentum_dtype": torch.bfloat16, "seed": 3}),
        (torch.float32, {"momentum_dtype": torch.int8}),
        (torch.bfloat16, SMALL),
        (torch.bfloat16, {"momentum_dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_the_next_steps_are_bit_identical(copied, kernels, steps, dtype, settings):
    pair = model_and_optimizer(kernels, dtype, **settings)
    train(pair, steps, seed=1)
    other = copied(pair)
    for one in (pair, other):
        train(one, 3, seed=2)
    assert other[1].kernel_choices == pair[1].kernel_choices
    assert_same(pair, other)


@COPIES
def test_names_and_model_weights_are_those_of_the_copy(copied):
    model, _ = model_and_optimizer("plain")
    params = list(model.parameters())
    names = {param: f"layer {index}" for index, param in enumerate(params)}
    optimizer = CAME(params, lr=1e-2, momentum_dtype=torch.int8, names=names, kernels="plain")
    weights = {param: param.detach().bfloat16() for param in params}
    optimizer.set_model_weights(weights)
    train((model, optimizer), 2, seed=1)
    other, twin, copies = copied((model, optimizer, list(weights.values())))
    train((model, optimizer), 3, seed=2)
    train((other, twin), 3, seed=2)
    assert_same((model, optimizer), (other, twin))
    assert all(map(torch.equal, copies, weights.values()))
    assert all(map(torch.equal, copies, [p.detach().bfloat16() for p in other.parameters()]))


def test_the_original_is_not_touched():
    pair = model_and_optimizer("plain")
    train(pair, 1, seed=1)
    before = [param.detach().clone() for param in pair[0].parameters()]
    train(copy.deepcopy(pair), 2, seed=2)
    assert all(map(torch.equal, before, pair[0].parameters()))


def test_flat_convolutions_are_kept():
    param = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    twin = copy.deepcopy(CAME([param], lr=1e-2, flat_convolutions=True))
    twin.init_state()
    (state,) = twin.state.values()
    assert state["exp_avg_sq_col"].shape == (36,)


def test_a_pickle_of_an_older_version_loads():
    _, optimizer = model_and_optimizer("plain")
    old = CAME.__new__(CAME)
    old.__setstate__(torch.optim.Optimizer.__getstate__(optimizer))
    for group in old.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    old.step()
    assert all(value.dtype == torch.float32 for s in old.state.values() for value in s.values())


def test_schedules_of_a_copy_are_its_own():
    model, optimizer = model_and_optimizer("plain")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train((model, optimizer), 1, seed=1)
    twin = copy.deepcopy(optimizer)
    scheduler.step()
    assert twin.param_groups[0]["lr"] == 2 * optimizer.param_groups[0]["lr"]


def test_optimizers_with_shards_are_refused_in_words():
    param = torch.nn.Parameter(torch.randn(6))
    optimizer = CAME([param], lr=1e-2, shards={param: Shard((4, 3), 0, 6)})
    with pytest.raises(TypeError, match=r"use state_dict\(\)"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match=r"use state_dict\(\)"):
        pickle.dumps(optimizer)
