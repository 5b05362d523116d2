"""The kernels against the plain path in float64; Triton's under its interpreter without a GPU."""

import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_came import CAME, Shard
from megatron_came.bench.peak import peak_of
from megatron_came.core.parameter_slice import SliceSums
from megatron_came.kernels.dispatch import choose
from megatron_came.kernels.triton.device import sets_save_time
from megatron_came.kernels.triton.passes import TritonBackend
from megatron_came.kernels.triton.tables import AdditionField
from megatron_came.kernels.triton.tiling import Tiling, cut, in_cache
from megatron_came.voice import warn_once
from scripts.cases.kernels import (
    CASES,
    TOLERANCE,
    bad_gradients,
    model_weights_after_steps,
    worst_distance,
)
from scripts.cases.slices import Layout
from tests.support.oracle import DEVICES, ON_REAL_DEVICES, on_both
from tests.support.slices import MID_ROW
from tests.support.slices import worst_distance as worst_sharded_distance


@on_both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_plain_path(case, kernels):
    assert worst_distance(case, kernels, DEVICES[kernels]) <= TOLERANCE


@pytest.mark.parametrize("elements", [1, 500])
def test_matrices_that_fit_a_cache(elements, monkeypatch):
    monkeypatch.setattr(TritonBackend, "cache_elements", elements)
    case = next(case for case in CASES if case.name == "batches")
    assert worst_distance(case, "triton", DEVICES["triton"]) <= TOLERANCE


def test_a_gpu_takes_sets_that_fit_its_cache_where_memory_is_slow():
    mebibyte = 2**20
    assert not sets_save_time(50 * mebibyte // 8, 4.8e12)  # H200
    assert sets_save_time(72 * mebibyte // 8, 1.0e12)  # GeForce RTX 4090
    assert not sets_save_time(72 * mebibyte // 8, 0.0)  # not known


def test_the_size_of_the_cache_changes_no_order_of_sums():
    shards = [Shard.whole(shape) for shape in ((30, 70), (9, 9), (2, 50, 200), (400, 3), (5, 999))]
    sums = []
    for shard in shards:
        batch, rows, columns = shard.local_matrix
        sizes = [(batch, rows), (batch, columns), (), (3, batch, rows), (3, batch, columns)]
        tensors = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        sums.append(SliceSums(tensors[:2], tensors[2], tensors[3:]))
    tables = []
    for limit in (None, 1, 2500, 12000):
        together = list(in_cache([shard.numel for shard in shards], limit))
        _, additions, sets, tiles = cut(shards, sums, Tiling(8, 64, 20), together)
        assert tiles <= 20
        assert (len(sets) == 1) == (limit is None)
        tables.append(additions[:, AdditionField.STRIDE :])  # where the sums are is another matter
    assert all(np.array_equal(table, tables[0]) for table in tables)


# Shape, dtypes of weights and gradient, and of the model's copy.
UNLIKE = [
    ((12, 512), torch.float32, torch.float32, None),
    ((9, 90), torch.float32, torch.float32, None),
    ((12, 512), torch.float32, torch.bfloat16, torch.bfloat16),
    ((20, 260), torch.bfloat16, torch.bfloat16, None),
    ((20, 260), torch.float32, torch.float32, torch.float16),
]


def train_unlike(numbers, momentum):
    """Update some of them in one optimizer; return what each has become."""
    device, params, copies = DEVICES["triton"], {}, {}
    for number in numbers:
        shape, dtype, _, copy = UNLIKE[number]
        start = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        params[number] = torch.nn.Parameter(start.to(device, dtype))
        if copy:
            copies[number] = torch.zeros(shape, dtype=copy, device=device)
    optimizer = CAME(
        params.values(), lr=1e-2, kernels="triton", momentum_dtype=momentum, remainders=True,
        names={param: str(number) for number, param in params.items()},
    )  # fmt: skip
    optimizer.set_model_weights({params[number]: copy for number, copy in copies.items()})
    for step in range(2):
        for number, param in params.items():
            generator = torch.Generator().manual_seed(100 * step + number)
            grad = torch.randn(param.shape, generator=generator)
            param.decoupled_grad = grad.to(device, UNLIKE[number][2])
        optimizer.step()
    return {
        number: [param.detach(), *optimizer.state[param].values(), copies.get(number)]
        for number, param in params.items()
    }


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_parameters_of_unlike_kinds_do_not_see_one_another(momentum):
    """Those of a kind share a launch: each becomes what it becomes alone, to the last bit."""
    together = train_unlike(range(len(UNLIKE)), momentum)
    for number, ours in together.items():
        (alone,) = train_unlike([number], momentum).values()
        pairs = [(a, b) for a, b in zip(ours, alone, strict=True) if a is not None]
        assert all(torch.equal(a, b) for a, b in pairs)


@on_both
def test_what_is_not_finite_is_not_hidden(kernels):
    ours = bad_gradients(kernels, DEVICES[kernels])
    plain = bad_gradients("plain", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert not all(mask.all() for mask in plain)


def test_autograd_notices_a_step():
    param = torch.nn.Parameter(torch.ones(3, 4))
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    CAME([param], lr=1e-2, kernels="numba").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("rows", "most"), [(1, 128), (8, 128), (12, 3), (500, 128)])
@pytest.mark.parametrize("name", ["middle of rows", "aligned", "batches"])
def test_any_cut_into_tiles_of_rows(name, rows, most, monkeypatch):
    monkeypatch.setattr("megatron_came.kernels.cpu.shapes._TILE_ROWS", rows)
    monkeypatch.setattr("megatron_came.kernels.cpu.shapes._MIN_TILES", 1)
    monkeypatch.setattr("megatron_came.kernels.cpu.shapes._MAX_TILES", most)
    monkeypatch.setattr("megatron_came.kernels.cpu.shapes._MAX_ALIGNED", 4)
    case = next(case for case in CASES if case.name == name)
    assert worst_distance(case, "numba", DEVICES["numba"]) <= TOLERANCE


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(8, 64, 1),
        Tiling(16, 64, 7),
        Tiling(24, 64, 7),
        Tiling(8, 64, 3, addition=16, tallest=64),  # 64 rows high
        Tiling(8, 16, 1, addition=16, tallest=32),  # to 32, in several fills of the scratch buffer
    ],
    ids=str,
)
def test_any_cut_into_tiles(tiling):
    case = next(case for case in CASES if case.name == "middle of rows")
    with mock.patch.object(TritonBackend, "tiling", tiling):
        assert worst_distance(case, "triton", DEVICES["triton"]) <= TOLERANCE


@pytest.mark.parametrize("tp_dim", [None, 0, 1])
def test_slices_on_several_ranks_in_triton(tp_dim):
    worst = worst_sharded_distance(
        2, 2, [Layout((24, 40), tp_dim, ((0.37,),) * 2)], (0.9, 0.999, 0.9999), "spikes",
        torch.float32, "triton", seed=3, steps=4,
    )  # fmt: skip
    assert worst <= TOLERANCE


def test_slices_of_a_vector_and_of_batches_in_triton():
    tensors = [Layout((98,), 0, ((0.3,), (0.7,))), Layout((6, 14, 10), 0, MID_ROW)]
    worst = worst_sharded_distance(
        2, 2, [Layout(t.shape, t.tp_dim, tuple(cut[:1] for cut in t.cuts)) for t in tensors],
        (0.9, 0.999, 0.9999), "wakes", torch.float32, "triton", seed=3, steps=4,
    )  # fmt: skip
    assert worst <= TOLERANCE


def test_kernels_from_the_cache_change_no_bit(tmp_path):
    """The first process compiles them, the second loads what the first has kept.

    Two dtypes have machine code of most functions twice.
    """
    script = (
        "import torch; from scripts.cases.kernels import CASES, train; import sys\n"
        "for case in (case for case in CASES if case.name in ('matrix', 'bf16 gradients')):\n"
        "    for update in train(case, 'numba', torch.device('cpu'), torch.float32):\n"
        "        sys.stdout.write(update.numpy().tobytes().hex())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    results = []
    for _ in range(2):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(done.stdout)
        assert list(tmp_path.rglob("*.nbc"))
    assert results[0] == results[1] != ""


@pytest.mark.parametrize("kernels", ON_REAL_DEVICES)
def test_no_temporary_has_the_size_of_a_parameter(kernels):
    param = torch.nn.Parameter(torch.randn(3000, 1000, device=DEVICES[kernels]))
    param.grad = torch.randn_like(param)
    optimizer = CAME([param], lr=1e-2, kernels=kernels)
    optimizer.step()
    assert param.nbytes > 11 * 2**20
    assert peak_of(optimizer.step, param.device) <= 8 * 2**20


def test_a_temporary_of_the_size_of_a_parameter_is_seen():
    assert peak_of(lambda: torch.ones(3000, 1000), torch.device("cpu")) >= 4 * 3000 * 1000
    assert peak_of(lambda: np.ones((3000, 1000)), torch.device("cpu")) >= 8 * 3000 * 1000


@pytest.mark.parametrize(
    ("wanted", "device", "message"),
    [
        ("cuda", "cpu", "not one of auto, plain, numba, triton"),
        ("numba", "cuda", "do not run on cuda: use 'auto' or 'plain'"),
        ("numba", "meta", "do not run on meta"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused(wanted, device, message):
    with pytest.raises(ValueError, match=message):
        choose(wanted, torch.device(device))


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        (torch.float32, (20, 30), None),
        (torch.float64, (20, 30), "float64 weights"),
        (torch.float32, (128, 3, 3), "batches of many small matrices"),
    ],
)
def test_what_kernels_leave_to_plain_pytorch_is_said_once(dtype, shape, why, caplog):
    warn_once.cache_clear()
    params = [torch.nn.Parameter(torch.randn(size)) for size in ((9, 8), (7,))]
    params.append(torch.nn.Parameter(torch.randn(shape, dtype=dtype)))
    for _ in range(2):
        optimizer = CAME(params, lr=1e-2, kernels="numba")
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
    lines = [record.getMessage() for record in caplog.records if "slower" in record.getMessage()]
    assert len(lines) == (why is not None)
    assert all(f"for 1 of 3 parameters: 1 with {why}" in line for line in lines)


def test_without_numba_the_step_is_plain_and_says_what_is_lost(monkeypatch, caplog):
    # As if importing it failed.
    monkeypatch.setitem(sys.modules, "megatron_came.kernels.cpu.launch", None)
    choice = choose("auto", torch.device("cpu"))
    assert choice.backend.name == "plain"
    assert "slower: numba cannot be used" in choice.reason
    with pytest.raises(ValueError, match=r"need numba, .*: pip install 'megatron-came\[cpu\]'"):
        choose("numba", torch.device("cpu"))
    param = torch.nn.Parameter(torch.ones(3, 4))
    param.grad = torch.ones_like(param)
    CAME([param], lr=1e-2).step()
    assert [record.getMessage() for record in caplog.records] == [choice.reason]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_step_can_be_captured_in_a_cuda_graph(momentum):
    from scripts.gpu_check import check_graph_capture

    check_graph_capture(momentum)


@pytest.mark.parametrize("kernels", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_weights_are_rewritten(kernels, dtype):
    pairs = model_weights_after_steps(kernels, DEVICES[kernels], dtype)
    assert len(pairs) == 4
    assert all(torch.equal(weight, expected) for weight, expected in pairs)
    assert not torch.equal(pairs[0][0], pairs[2][0])


def test_model_weights_must_fit():
    param = torch.nn.Parameter(torch.ones(9, 70))
    with pytest.raises(ValueError, match="of 630 elements must be contiguous with as many"):
        CAME([param], lr=1e-2).set_model_weights({param: torch.zeros(3)})


@on_both
def test_a_learning_rate_may_be_a_tensor(kernels):
    device, results = DEVICES[kernels], []
    for as_tensor in (False, True):
        param = torch.nn.Parameter(torch.ones(6, 5, device=device))
        rate = torch.tensor(1e-2, device=device) if as_tensor else 1e-2
        optimizer = CAME([param], lr=rate, kernels=kernels)
        for step in range(3):
            value = 1e-2 / (step + 1)
            if as_tensor:
                rate.fill_(value)
            else:
                optimizer.param_groups[0]["lr"] = value
            param.grad = torch.arange(30.0, device=device).view(6, 5) - 11
            optimizer.step()
        results.append(param.detach().cpu())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
