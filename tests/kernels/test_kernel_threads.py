"""The threads that share the work of Numba's kernels."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from megatron_came import CAME
from megatron_came.kernels.cpu import threads

pytest.importorskip("numba")
MOMENTA = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture
def set_threads():
    """What sets how many threads PyTorch uses, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weights_after(count, momentum, set_threads):
    """Weights and momentum after steps of a large matrix, of batches and of a slice."""
    set_threads(count)
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((700, 300), (3, 257, 130), (70001,))
    ]
    optimizer = CAME(params, lr=1e-2, kernels="numba", momentum_dtype=momentum)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [*map(torch.Tensor.detach, params), *(optimizer.state[p]["exp_avg"] for p in params)]


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_the_number_of_threads_changes_no_bit(momentum, set_threads, monkeypatch):
    import numba

    # Every third number of threads, also more than there are processors.
    monkeypatch.setattr(threads, "usable", torch.get_num_threads)
    counts = sorted({1, 2, int(numba.config.NUMBA_NUM_THREADS)})
    results = [weights_after(count, momentum, set_threads) for count in counts]
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_run_on_pytorchs_threads():
    command = [sys.executable, "-m", "tests.support.threads_probe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# A step before and one after the fork, in both processes; the parent's must be the child's.
FORKED_SCRIPT = """
import os, signal, sys, torch
from megatron_came import CAME
from megatron_came.kernels.cpu import threads
from megatron_came.kernels.dispatch import choose
torch.manual_seed(0)
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.randn(20000, 30))
optimizer = CAME([param], lr=1e-2, kernels="numba")
param.grad = torch.randn(20000, 30)
optimizer.step()
param.grad = torch.randn(20000, 30)
usable = threads.usable()
child = os.fork()
signal.alarm(200)
optimizer.step()
bits = param.detach().numpy().tobytes()
if child:
    assert threads.usable() == usable
    assert os.waitpid(child, 0)[1] == 0
    assert open(sys.argv[1], "rb").read() == bits
else:
    assert threads.usable() == 1
    assert "on one thread: this process was forked" in choose("auto", param.device).reason
    open(sys.argv[1], "wb").write(bits)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(tmp_path):
    command = [sys.executable, "-c", FORKED_SCRIPT, tmp_path / "bits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_pool_without_openmp_is_spoken_of(monkeypatch, set_threads, caplog):
    import numba

    set_threads(2)
    if threads.usable() == 1:
        pytest.skip("one processor")
    threads._start.cache_clear()
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    assert threads.usable() > 1
    assert "Numba has found no OpenMP library" in caplog.text
    threads._start.cache_clear()


def in_a_process(script, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def test_a_layer_that_cannot_be_loaded_leaves_one_thread():
    done = in_a_process(STEP_SCRIPT, NUMBA_THREADING_LAYER="tbb", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-2000:]
    if "TBB" not in done.stderr:
        pytest.skip("TBB is installed, or there is one processor")
    assert "run on one thread" in done.stderr
    assert "unset NUMBA_THREADING_LAYER" in done.stderr


STEP_SCRIPT = """
import torch
from megatron_came import CAME
before = torch.get_num_threads()
param = torch.nn.Parameter(torch.ones(500, 300))
optimizer = CAME([param], lr=1e-2, kernels="numba")
param.grad = torch.ones(500, 300)
optimizer.step()
assert torch.get_num_threads() == before
assert param[0, 0] < 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_an_optimizer_alone_starts_no_threads():
    done = in_a_process(CHILDS_SCRIPT, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-2000:]


# The children of a process that has made an optimizer may use Numba's threads, as data loaders do.
CHILDS_SCRIPT = """
import os, torch, numpy, numba
from megatron_came import CAME

@numba.njit(parallel=True)
def total(a):
    s = 0.0
    for i in numba.prange(a.size):
        s += a[i]
    return s

CAME([torch.nn.Parameter(torch.ones(5, 3))], lr=1e-2, kernels="numba")
child = os.fork()
if not child:
    os._exit(int(total(numpy.ones(1000)) != 1000))
assert os.waitpid(child, 0)[1] == 0
"""


def test_memory_is_not_held_beyond_its_tensors():
    param = torch.nn.Parameter(torch.ones(500, 300))
    optimizer = CAME([param], lr=1e-2, kernels="numba")
    param.grad = torch.ones(500, 300)
    optimizer.step()
    for tensor in (param.grad, param, *optimizer.state[param].values()):
        tensor.untyped_storage().resize_(0)  # refused where NumPy has a view


# In a process of its own: numba, imported first, may bring another OpenMP library.
STRANGERS_SCRIPT = """
import numba
numba.set_num_threads(numba.get_num_threads())
import torch
before = torch.get_num_threads()
torch.set_num_threads(2)
from megatron_came.kernels.cpu import threads
threads.usable()
assert torch.get_num_threads() == 2
"""


def test_starting_the_pool_keeps_pytorchs_number_of_threads():
    done = subprocess.run(
        [sys.executable, "-c", STRANGERS_SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
