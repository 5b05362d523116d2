"""Weights of convolutions taken for matrices: the authors' algorithm on the matrices."""

import pytest
import torch

from megatron_came import CAME, Shard
from tests.support.oracle import (
    DEVICES,
    TOLERANCE,
    distance,
    gradient_history,
    on_every_path,
    oracle_updates,
    with_all_kernels,
)

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
SHAPES = [(16, 8, 3, 3), (90, 4, 5), (6, 1, 3, 3), (5, 4, 2, 3, 3), (1, 1, 1), (7, 9), (11,)]


@on_every_path
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_numbers_as_of_the_matrices(kernels, dtype, channels_last):
    for shape in SHAPES:
        history = gradient_history(shape, 8, "spikes", dtype, torch.Generator().manual_seed(0))
        start = torch.randn(shape, dtype=dtype)
        param = torch.nn.Parameter(start.clone().to(DEVICES[kernels]))
        if channels_last and len(shape) == 4:
            param = torch.nn.Parameter(param.detach().to(memory_format=torch.channels_last))
        optimizer = CAME([param], kernels=kernels, flat_convolutions=True, **SETTINGS)
        for grad in history:
            param.grad = grad.clone().to(param.device)
            optimizer.step()
        flat = (shape[0], -1) if len(shape) > 1 else shape
        matrices = [grad.reshape(flat) for grad in history]
        theirs = oracle_updates(start.reshape(flat), matrices, **SETTINGS)[-1]
        ours = param.detach().cpu().reshape(flat)
        assert distance(ours, theirs, start.reshape(flat)) <= TOLERANCE[dtype]


@with_all_kernels
@pytest.mark.parametrize("momentum", [torch.bfloat16, torch.int8], ids=str)
def test_small_momentum_is_saved_and_loaded(kernels, momentum):
    device = DEVICES[kernels]
    settings = {"kernels": kernels, "momentum_dtype": momentum, "flat_convolutions": True}
    params = [torch.nn.Parameter(torch.ones(8, 4, 3, 3, device=device)) for _ in range(2)]
    straight, resumed = (CAME([param], lr=1e-2, **settings) for param in params)
    for step in range(4):
        grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        for param in params:
            param.grad = grad.clone().to(device)
        straight.step()
        resumed.step()
        if step == 1:
            saved, resumed = resumed.state_dict(), CAME([params[1]], lr=1e-2, **settings)
            resumed.load_state_dict(saved)
    assert torch.equal(*params)


def test_factors_are_smaller_than_adams_second_moment():
    params = [torch.nn.Parameter(torch.ones(64, 32, 3, 3)) for _ in range(2)]
    sizes = []
    for param, is_flat in zip(params, (False, True), strict=True):
        optimizer = CAME([param], lr=1e-2, flat_convolutions=is_flat)
        optimizer.init_state()
        (state,) = optimizer.state.values()
        sizes.append(sum(v.numel() for key, v in state.items() if key != "exp_avg"))
    assert sizes == [4 * 3 * 64 * 32, 2 * (64 + 32 * 9)]


def test_with_shards_it_is_refused():
    param = torch.nn.Parameter(torch.ones(6, 4, 3))
    with pytest.raises(ValueError, match="flat_convolutions does not go with shards"):
        CAME([param], lr=1e-2, flat_convolutions=True, shards={param: Shard.whole((6, 4, 3))})
