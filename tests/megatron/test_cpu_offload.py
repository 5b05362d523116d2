"""Main weights on the CPU, the model on a device beside it: who computes what, and what travels."""

from unittest import mock

import pytest
import torch

from megatron_came import CAME, Shard
from megatron_came.core import sums
from megatron_came.core.sums import Request, SumBuffer
from megatron_came.kernels.cpu.launch import NumbaBackend
from megatron_came.megatron.cpu_offload import HostSlice, Offloaded, OffloadedCAME, evenly
from megatron_came.step import Plan
from tests.support.second_device import DEVICE, DeviceTensor, SecondDevice, on_cpu, on_device


class Pair:
    """A process group of two."""

    def size(self):
        return 2


GROUP = Pair()
# Shape of the local tensor, the slice of it, and whether it lies on the CPU.
SLICES = [
    ((8, 12), (5, 60), True),
    ((20, 6), (0, 70), False),
    ((10,), (2, 9), True),
    ((14,), (0, 7), False),
    ((4, 6, 5), (0, 0), True),  # nothing of it is held here
    ((6, 8), (0, 48), True),
]
STEPS = 3


def _doubled(tensor, op=None, group=None, async_op=False):
    """All-reduce where the other rank has the same addends; on the device, where there is one."""
    _doubled.devices.add(tensor.device)
    tensor.mul_(2)


def _gradients(dtype):
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(stop - start, generator=generator).to(dtype) for _, (start, stop), _ in SLICES]
        for _ in range(STEPS)
    ]


def _shards(params):
    return {
        param: Shard(shape=shape, start=start, stop=stop, dp_group=GROUP)
        for param, (shape, (start, stop), _) in zip(params, SLICES, strict=True)
    }


def _build(dtype, kernels, *, apart, **more):
    """CAME with 16-bit or fp32 weights of the model: on two devices, or on the CPU alone."""
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randn(stop - start, generator=generator) for _, (start, stop), _ in SLICES]
    place = on_device if apart else torch.clone
    params, models, slices = [], {}, {}
    for start, (*_, is_hosted) in zip(starts, SLICES, strict=True):
        is_hosted = is_hosted and apart
        weight = place(start.to(dtype))
        if is_hosted:
            param = start.clone()
            rounded = start.to(dtype) if dtype != torch.float32 and start.numel() else None
            slices[param] = HostSlice(DEVICE, weight, rounded)
        else:
            param = place(start) if dtype != torch.float32 else weight
        params.append(param)
        models[param] = weight
    kind = OffloadedCAME if apart else CAME
    came = kind(params, lr=1e-2, weight_decay=0.1, kernels=kernels, **more)
    came.set_shards(_shards(params), {param: f"{n}" for n, param in enumerate(params)})
    if apart:
        came.keep_on_host(slices)
    came.init_state()
    if dtype != torch.float32:
        came.set_model_weights({p: w for p, w in models.items() if p.numel()})
    return came, models


def _train(came, models, dtype):
    seen = []
    for grads in _gradients(dtype):
        for (param, weight), grad in zip(models.items(), grads, strict=True):
            if param.numel():
                there = isinstance(weight, DeviceTensor)
                param.decoupled_grad = on_device(grad) if there else grad.clone()
        came.step()
        seen += [on_cpu(weight) for weight in models.values()]
        seen += [on_cpu(v) for p in models for _, v in sorted(came.state[p].items())]
    return seen


@pytest.fixture
def doubled():
    _doubled.devices = set()
    with mock.patch.object(sums.dist, "all_reduce", side_effect=_doubled) as all_reduce:
        yield all_reduce


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [torch.float32, torch.int8])
@pytest.mark.parametrize("more", [{}, {"spike_guard": 3.0}], ids=["", "guarded"])
def test_no_operation_mixes_the_devices_and_the_numbers_are_the_same(
    dtype, momentum, more, doubled
):
    alone, of_one = _build(dtype, "plain", apart=False, momentum_dtype=momentum, **more)
    expected = _train(alone, of_one, dtype)
    count = doubled.call_count
    _doubled.devices.clear()
    with SecondDevice() as device:
        came, models = _build(dtype, "plain", apart=True, momentum_dtype=momentum, **more)
        device.down = device.up = 0
        seen = _train(came, models, dtype)
        assert doubled.call_count == 2 * count == 4 * STEPS  # two a step, as without
        figures = came.diagnostics()
    assert all(map(torch.equal, seen, expected))
    assert _doubled.devices == {DEVICE}
    assert figures == alone.diagnostics()


def test_each_device_has_its_own_parameters_and_backend(doubled):
    taken = []
    original = NumbaBackend.passes

    def passes(self, sums, **given):
        taken.extend(sums)
        return original(self, sums, **given)

    with SecondDevice(), mock.patch.object(NumbaBackend, "passes", passes):
        came, models = _build(torch.bfloat16, "auto", apart=True)
        seen = _train(came, models, torch.bfloat16)
    hosted = [param for param, weight in models.items() if not isinstance(param, DeviceTensor)]
    assert [slice_.param for slice_ in taken] == hosted
    assert len(hosted) == sum(is_hosted for *_, is_hosted in SLICES)
    for param in models:
        where = {value.device for value in came.state[param].values()}
        assert where == {param.device}
    expected = _train(*_build(torch.bfloat16, "auto", apart=False), torch.bfloat16)
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)


def test_gradients_come_down_weights_go_up_and_little_else(doubled):
    with SecondDevice() as device:
        came, models = _build(torch.bfloat16, "plain", apart=True)
        _train(came, models, torch.bfloat16)
        device.down = device.up = 0
        for param in models:
            if param.numel():
                param.decoupled_grad = on_device(torch.ones(param.numel(), dtype=torch.bfloat16))
        device.down = device.up = 0
        came.step()
        down, up = device.down, device.up
    hosted = sum(stop - start for _, (start, stop), is_hosted in SLICES if is_hosted)
    sums_of_all = sum(each.numel() for each in came.sums if isinstance(each, DeviceTensor))
    assert up == hosted + sums_of_all
    assert hosted + sums_of_all <= down <= hosted + sums_of_all + 8  # and single numbers


def test_weights_come_down_where_somebody_else_has_written_them(doubled):
    """Of an fp32 model: who loads weights alone writes the model's."""
    with SecondDevice() as device:
        came, models = _build(torch.float32, "plain", apart=True)
        _train(came, models, torch.float32)
        downs = []
        for is_written in (False, True, False):
            for param, weight in models.items():
                if param.numel():
                    param.decoupled_grad = on_device(torch.ones(param.numel()))
                    if is_written:
                        weight.copy_(on_device(torch.full((param.numel(),), 3.0)))
            device.down = 0
            came.step()
            downs.append(device.down)
            if is_written:
                for weight in models.values():
                    assert torch.all((on_cpu(weight) - 3).abs() < 1)
    hosted = sum(stop - start for _, (start, stop), is_hosted in SLICES if is_hosted)
    assert downs[1] == downs[0] + hosted == downs[2] + hosted


def test_whether_16_bit_weights_were_written_is_seen_as_well():
    """Of remainders, whose main weights are the model's own in bf16; of an odd number."""
    weight = torch.ones(7, dtype=torch.bfloat16)
    came = OffloadedCAME([weight.clone()])
    came.on_host = {weight: HostSlice(DEVICE, weight, None)}
    before = came._bits()
    assert torch.equal(came._bits(), before)
    weight[3] += 2**-7
    assert not torch.equal(came._bits(), before)


def test_a_slice_without_elements_may_be_of_any_dtype():
    """Of fp16 weights a rank owns nothing of, where others are rounded."""
    empty = torch.empty(0, dtype=torch.float16)
    came = OffloadedCAME([torch.ones(3)])
    came.on_host = {empty: HostSlice(DEVICE, empty, None)}
    assert came._bits() is None


def test_sums_of_the_cpu_join_those_of_the_device(doubled):
    requests = [Request((3,), dp_group=GROUP), Request((2,)), Request((4,), dp_group=GROUP)]
    with SecondDevice():
        buffer = SumBuffer(requests, DEVICE, [True, False, False])
        for _ in range(2):
            buffer.zero_()
            buffer.views[0].add_(1.0)
            buffer.views[1].add_(5.0)
            buffer.views[2].add_(torch.full((4,), 3.0, dtype=torch.float64, device=DEVICE))
            buffer.start()
            buffer.finish()
            assert [on_cpu(view).tolist() for view in buffer.views] == [[2] * 3, [5] * 2, [6] * 4]
        kinds = [isinstance(view, DeviceTensor) for view in buffer.views]
    assert kinds == [False, True, True]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_fraction_is_spread_evenly(fraction):
    params = [torch.empty(n) for n in (4000, 10, 700, 700, 10, 2800, 700, 700, 10, 2800, 4000)]
    chosen = evenly(params, fraction, has_copies=False)
    seen = taken = 0
    for param in params:  # of any beginning of the model, too
        seen += param.numel()
        taken += param.numel() * (param in chosen)
        assert abs(taken - fraction * seen) <= 2000
    assert (chosen == set(params)) == (fraction == 1)
    assert bool(chosen) == (fraction > 0)


def test_copies_of_tied_embeddings_stay_unless_all_goes():
    words, rest = torch.empty(100), torch.empty(300)
    words.shared_embedding = True
    assert evenly([words, rest], 0.9, has_copies=True) == {rest}
    assert evenly([words, rest], 1.0, has_copies=True) == {words, rest}
    assert words in evenly([words, rest], 0.9, has_copies=False)


def test_it_stays_on_the_cpu_when_the_rest_comes_back_from_there(doubled):
    class Wrapper(Offloaded):
        pass

    with SecondDevice() as device:
        came, models = _build(torch.float32, "plain", apart=True)
        wrapper = Wrapper()
        hosted = [param for param in models if not isinstance(param, DeviceTensor)]
        wrapper.optimizer, wrapper._pairs = came, [(models[param], param) for param in hosted]
        device.up = 0
        wrapper.restore_from_cpu()
        assert device.up == 0
    assert all(value.device.type == "cpu" for p in hosted for value in came.state[p].values())


def test_a_plan_without_it_has_one_buffer_a_pass():
    param = torch.randn(6, 8)
    came = CAME([param])
    param.grad = torch.randn(6, 8)
    came.step()
    assert isinstance(came._plan, Plan)
    assert len(came.sums) == 2
