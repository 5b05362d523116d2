"""Momentum in 16 and 8 bits, and fp32 weights as bf16 weights and remainders."""

import copy
import itertools

import came_pytorch
import numpy as np
import pytest
import torch

from megatron_came import CAME, Shard
from megatron_came.bench.peak import peak_of
from megatron_came.core import int8, remainders
from megatron_came.core.rounding import random_bits
from megatron_came.core.saved import saved_momentum
from megatron_came.core.shard import boxes
from tests.support.oracle import (
    COMPILED,
    DEVICES,
    INTERPRETED,
    ON_REAL_DEVICES,
    with_all_kernels,
)

# Even numbers can be halved; of rows of 1100 pass 2 takes several at once; blocks of int8 momentum
# are halves of rows of 512.
SHAPES = ((20, 150), (334,), (34000,), (2, 5, 61), (10, 1100), (6, 512))
SMALL = (torch.bfloat16, torch.int8)
CUTS = ("whole", "sliced", "aligned", "stacked projections")
on_all = pytest.mark.parametrize("kernels", DEVICES)


def unlike_values(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * torch.exp(4 * torch.randn(n, generator=generator))


class TwoRanks:
    """Stands for a process group of two, of which only the size is asked."""

    def size(self):
        return 2


class TestInt8:
    @pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 5000])
    def test_the_error_is_as_stated(self, numel):
        values = unlike_values(numel)
        for bits, least in ((None, 127), (random_bits(torch.arange(numel), 5), 63.5)):
            quantized, scale = int8.quantize(values, bits)
            assert quantized.dtype == torch.int8
            assert scale.shape == (int8.blocks(numel),)
            back = int8.dequantize(quantized, scale)
            pairs = zip(back.split(256), values.split(256), strict=True)
            for block, was in pairs if numel else ():
                assert (block - was).abs().max() <= was.abs().max() / least

    def test_what_was_rounded_once_stays(self):
        once = int8.dequantize(*int8.quantize(unlike_values(5000)))
        for bits in (None, random_bits(torch.arange(5000), 5)):
            assert torch.equal(int8.dequantize(*int8.quantize(once, bits)), once)
        assert torch.equal(once.to(torch.bfloat16).float(), once)

    def test_rounding_is_right_on_average(self):
        values, rounds = unlike_values(512), 2000
        total = torch.zeros(512, dtype=torch.float64)
        for key in range(rounds):
            bits = random_bits(torch.arange(512), key * 7919)
            quantized, scale = int8.quantize(values, bits)
            total += int8.dequantize(quantized, scale)
        error = (total / rounds - values) / scale.repeat_interleave(256)
        # The standard deviation of a rounding is half a scale at most.
        assert error.abs().max() < 5 * 0.5 / rounds**0.5
        assert error.mean().abs() < 5 * 0.5 / (rounds * 512) ** 0.5

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_not_hidden(self, bad):
        values = torch.ones(600)
        values[300] = bad
        back = int8.dequantize(*int8.quantize(values))
        assert back[256:512].isnan().all()
        assert torch.equal(back[:256], values[:256])

    @pytest.mark.parametrize("value", [0.0, 1e-45, 1.2e-38, 1e38])
    def test_extreme_values(self, value):
        back = int8.dequantize(*int8.quantize(torch.tensor([value])))
        assert abs(back.item() - value) <= max(value / 127, 2.0**-126)

    def test_rows_of_unlike_size_keep_their_own_scale(self):
        """A block must not span what that of another implementation does: 1024 x 1024 elements."""
        sizes = torch.logspace(-4, 0, 1024).view(-1, 1)
        values = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * sizes
        back = int8.dequantize(*int8.quantize(values.view(-1))).view(1024, 1024)
        errors = (back - values).norm(dim=1) / values.norm(dim=1)
        # Of 256 normal numbers the largest is below 4.5; errors are uniform within a scale.
        assert errors.max() < 4.5 / 63.5 / 12**0.5
        step = values.abs().max() / 127
        whole = (values / step).round() * step
        assert ((whole - values).norm(dim=1) / values.norm(dim=1)).max() > 0.9


class TestRemainders:
    def test_every_value_comes_back(self):
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator)
        edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF]
        edges = torch.tensor(edges)
        whole = torch.cat([bits, edges, edges - 2**31]).to(torch.int32)
        weights, rest = remainders.split(whole.view(torch.float32))
        assert weights.dtype == torch.bfloat16
        assert rest.dtype == torch.int16
        back = remainders.join(weights, rest)
        nan = whole.view(torch.float32).isnan()
        assert torch.equal(back.view(torch.int32)[~nan], whole[~nan])
        assert back[nan].isnan().all()
        assert weights[nan].isnan().all()
        assert 0 < nan.sum() < len(whole)

    def test_the_weight_is_the_nearest_but_for_ties(self):
        values = unlike_values(1 << 20)
        weights, rest = remainders.split(values)
        other = weights.view(torch.int16) != values.to(torch.bfloat16).view(torch.int16)
        assert (rest[other] == -32768).all()
        assert not other.all()


def parameters(kernels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in SHAPES]
    return [torch.nn.Parameter(start.to(DEVICES[kernels], dtype)) for start in starts]


def train(params, optimizer, steps=3, grad_dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for param in params:
            rows = torch.rand(param.shape[:-1], generator=generator).unsqueeze(-1) + 0.1
            grad = torch.randn(param.shape, generator=generator) * rows * 10 ** (step % 2)
            param.decoupled_grad = grad.to(param.device, grad_dtype)
        optimizer.step()


def weights_of(params, optimizer):
    return [
        remainders.join(param.detach(), optimizer.state[param]["remainder"])
        if "remainder" in optimizer.state[param]
        else param.detach()
        for param in params
    ]


@pytest.mark.parametrize(
    ("momentum", "kernels"),
    [
        pytest.param(
            momentum,
            kernels,
            marks=INTERPRETED if kernels == "triton" and momentum != torch.int8 else (),
        )
        for momentum in (torch.float32, *SMALL)
        for kernels in DEVICES
    ],
    ids=str,
)
def test_remainders_train_as_fp32_weights_do(kernels, momentum):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(kernels, dtype)
        optimizer = CAME(
            params, lr=1e-2, weight_decay=0.1, kernels=kernels, momentum_dtype=momentum,
            remainders=True,
        )  # fmt: skip
        train(params, optimizer, steps=2, grad_dtype=torch.bfloat16)
        results.append(weights_of(params, optimizer))
    for fp32, two_halves in zip(*results, strict=True):
        assert torch.equal(fp32, two_halves)


@pytest.mark.parametrize(
    ("cut", "momentum", "kernels"),
    [
        *itertools.product(CUTS, SMALL, ["numba"]),
        *zip(CUTS, itertools.cycle(SMALL), itertools.repeat("triton"), strict=False),
        *(
            pytest.param(cut, momentum, "triton", marks=INTERPRETED)
            for cut, momentum in zip(CUTS, itertools.cycle(SMALL[::-1]), strict=False)
        ),
    ],
    ids=str,
)
def test_kernels_round_as_the_plain_path_does(kernels, momentum, cut, monkeypatch):
    """The same random bits, but where a number was on the verge of another rounding."""
    monkeypatch.setattr("megatron_came.core.sums.dist.all_reduce", lambda *_, **__: None)
    results = {}
    for path in ("plain", kernels):
        params, shards = parameters(path), {}
        for param in params if cut != "whole" else ():
            start, stop = param.numel() // 3 + 5, param.numel() - 17
            if cut == "aligned":  # of the last one, at the beginning of a block
                start, stop = param.numel() // 12 * 4, param.numel() // 4 * 4 - 16
            shape, param.data = tuple(param.shape), param.data.view(-1)[start:stop].clone()
            second = {"tp_dim": 0, "tp_group": TwoRanks(), "tp_rank": 1, "tp_parts": 2}
            is_cut = cut == "stacked projections" and len(shape) < 3
            shards[param] = Shard(shape, start, stop, **(second if is_cut else {}))
        names = {param: str(index) for index, param in enumerate(params)}
        optimizer = CAME(
            params, lr=1e-2, kernels=path, momentum_dtype=momentum, shards=shards, names=names,
            remainders=True,
        )  # fmt: skip
        train(params, optimizer, steps=2)
        assert all(optimizer.state[param]["exp_avg"].dtype == momentum for param in params)
        results[path] = [
            {key: value.cpu() for key, value in optimizer.state[param].items()} for param in params
        ]
    for ours, plain in zip(results[kernels], results["plain"], strict=True):
        assert (ours["exp_avg"] != plain["exp_avg"]).double().mean() < 0.005
        if momentum == torch.int8:
            assert torch.equal(ours["exp_avg_scale"], plain["exp_avg_scale"])


@pytest.mark.parametrize("kernels", COMPILED)
def test_each_element_is_read_with_the_scale_of_its_own_block(kernels):
    """Blocks of 256 end within rows, and every other one has a momentum a thousandth as large."""
    size = torch.where(torch.arange(8 * 384) // 256 % 2 == 0, 1.0, 1e-3).view(8, 384)
    states = []
    for path in ("plain", kernels):
        param = torch.nn.Parameter(torch.zeros(8, 384, device=DEVICES[path]))
        optimizer = CAME([param], lr=1e-2, kernels=path, momentum_dtype=torch.int8)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            param.grad = (torch.randn(8, 384, generator=generator) * size).to(param)
            optimizer.step()
        states.append(optimizer.state[param])
    for key in ("exp_avg_res_row", "exp_avg_res_col"):
        plain, ours = (state[key].cpu() for state in states)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)


@with_all_kernels
@pytest.mark.parametrize(("momentum", "bound"), [(torch.bfloat16, 0.01), (torch.int8, 0.02)])
def test_updates_stay_near_those_of_the_authors(momentum, bound, kernels):
    params = parameters(kernels)
    starts = [param.detach().cpu().double() for param in params]
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = CAME(params, lr=1e-2, momentum_dtype=momentum, kernels=kernels)
    other = came_pytorch.CAME(theirs, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        for param, their in zip(params, theirs, strict=True):
            grad = torch.randn(param.shape, generator=generator)
            param.grad, their.grad = grad.to(param.device), grad.double()
        optimizer.step()
        other.step()
    for param, their, start in zip(params, theirs, starts, strict=True):
        distance = (param.cpu().double() - their).norm() / (their - start).norm()
        assert 0 < distance < bound


def test_numba_draws_the_bits_of_places_beyond_32_bits():
    from megatron_came.kernels.cpu.precision import PLACE_FACTOR, first_state
    from megatron_came.kernels.cpu.precision import random_bits as bits_of

    for first, key in ((0, 5), (2**32 - 700, 0xFFFFFFFF), (5 * 2**32 - 1, 123), (2**40 + 3, 77)):
        places = [first, first + 699, first + 700]
        states = [first_state(place, np.uint32(key)) for place in places]
        drawn = torch.tensor([int(bits_of(state)) for state in states])
        assert torch.equal(drawn, random_bits(torch.tensor(places), key))
        same_half = min(2**32 - first % 2**32, 700)  # what a kernel draws with one beginning
        steps = np.arange(same_half, dtype=np.uint32) * PLACE_FACTOR
        drawn = torch.tensor([int(bits_of(state)) for state in states[0] + steps])
        assert torch.equal(drawn, random_bits(torch.arange(first, first + same_half), key))


@pytest.mark.parametrize("momentum", SMALL, ids=str)
@pytest.mark.parametrize("kernels", ["numba", pytest.param("triton", marks=INTERPRETED)])
def test_rounding_of_a_row_that_lies_across_32_bits_of_places(momentum, kernels):
    """The second tensor-parallel rank's slice of a matrix of more than 2^32 elements."""
    results = []
    for path in ("plain", kernels):
        generator = torch.Generator().manual_seed(2)
        columns, start = 70000, 2**32 // 70000 * 70000 + 100
        shard = Shard((2**32 // columns + 3, columns), start, start + 2 * columns)
        values, grad = torch.randn(2, 2 * columns, generator=generator).to(DEVICES[path])
        param = torch.nn.Parameter(values)
        optimizer = CAME(
            [param], lr=1e-2, kernels=path, momentum_dtype=momentum, shards={param: shard},
            names={param: "one"},
        )  # fmt: skip
        param.grad = grad
        optimizer.step()
        results.append(saved_momentum(optimizer.state[param]).float().cpu())
    assert (results[0] == results[1]).float().mean() > 0.999


def test_a_slice_draws_the_bits_of_its_place():
    """SwiGLU's two stacked projections, cut by tensor parallelism, and slices within a row."""
    full = torch.randn(16, 70, generator=torch.Generator().manual_seed(2))
    local = torch.cat([full[4:8], full[12:16]])  # of the second rank
    shard = Shard((8, 70), 33, 501, tp_dim=0, tp_group=TwoRanks(), tp_rank=1, tp_parts=2)
    device = torch.device("cpu")
    places = torch.cat([shard.full_offsets(box, device).view(-1) for box in boxes(shard, 100)])
    assert torch.equal(full.view(-1)[places], local.view(-1)[33:501])


@pytest.mark.parametrize("loaded", [torch.float32, *SMALL], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, *SMALL], ids=str)
def test_states_of_one_dtype_are_loaded_into_another(saved, loaded):
    params = parameters("plain")
    optimizer = CAME(params, lr=1e-2, momentum_dtype=saved)
    train(params, optimizer)
    other = CAME(params, lr=1e-2, momentum_dtype=loaded)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    bounds = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.int8: 1 / 127}
    for param in params:
        was, now = (momentum_in_fp32(each.state[param]) for each in (optimizer, other))
        assert other.state[param].keys() == other._new_state(param).keys()
        lossless = saved == loaded or (saved, loaded) == (torch.int8, torch.bfloat16)
        error = (was - now).abs().max() / was.abs().max()
        assert error <= (0.0 if lossless else bounds[loaded])
    train(params, other, steps=1)


def momentum_in_fp32(state):
    if state["exp_avg"].dtype == torch.int8:
        return int8.dequantize(state["exp_avg"], state["exp_avg_scale"])
    return state["exp_avg"].float()


@with_all_kernels
@pytest.mark.parametrize("momentum", [torch.float32, *SMALL], ids=str)
def test_a_resumed_run_is_bit_identical(kernels, momentum):
    settings = {"lr": 1e-2, "kernels": kernels, "momentum_dtype": momentum, "remainders": True}
    params = parameters(kernels, torch.bfloat16)
    optimizer = CAME(params, **settings)
    train(params, optimizer)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = CAME(twins, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, optimizer, seed=2)
    train(twins, resumed, seed=2)
    for one, other in zip(params, twins, strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, resumed.state[other][key])


@on_all
def test_nan_reaches_the_model_through_remainders(kernels):
    (param, *_) = parameters(kernels, torch.bfloat16)
    optimizer = CAME([param], lr=1e-2, kernels=kernels, remainders=True)
    grad = torch.ones(param.shape)
    grad.view(torch.int32).view(-1)[7] = 0x7FFFFFFF
    param.decoupled_grad = grad.to(param.device)
    optimizer.step()
    assert param.isnan().any()


@pytest.mark.parametrize("kernels", ON_REAL_DEVICES)
@pytest.mark.parametrize("momentum", SMALL, ids=str)
def test_no_temporary_has_the_size_of_a_parameter(momentum, kernels):
    param = torch.nn.Parameter(torch.randn(8000, 1000, device=DEVICES[kernels]).bfloat16())
    settings = {"kernels": kernels, "momentum_dtype": momentum, "remainders": True}
    optimizer = CAME([param], lr=1e-2, **settings)
    param.decoupled_grad = torch.randn_like(param)
    optimizer.step()
    assert param.nbytes > 15 * 2**20
    assert peak_of(optimizer.step, param.device) <= 8 * 2**20


def test_remainders_are_not_dropped():
    params = parameters("plain", torch.bfloat16)
    optimizer = CAME(params, lr=1e-2, remainders=True)
    optimizer.init_state()
    with pytest.raises(ValueError, match="would be lost: give remainders=True"):
        CAME(params, lr=1e-2).load_state_dict(optimizer.state_dict())


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not consist of 2 equal parts"):
        Shard((7, 3), 0, 21, tp_parts=2)


def test_a_dtype_that_momentum_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"float16 is not one of torch\.float32"):
        CAME([torch.nn.Parameter(torch.ones(3))], lr=1e-3, momentum_dtype=torch.float16)
