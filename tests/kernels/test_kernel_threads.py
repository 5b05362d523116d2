"""The threads that work off a schedule of Numba's kernels."""

import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch

from megatron_came import CAME
from megatron_came.kernels.cpu import threads
from megatron_came.kernels.dispatch import choose
from megatron_came.kernels.triton.tiling import Tiling
from tests.support.kernel_cases import CASES, train

TILING = "megatron_came.kernels.cpu.launch.NumbaBackend.tiling"


@pytest.fixture
def set_threads():
    """What sets how many threads PyTorch uses, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_thread_has_room_for_what_it_widens(set_threads):
    params = []
    for counts in ((1, 1), (1, 5)):
        generator = torch.Generator().manual_seed(0)
        params.append(torch.nn.Parameter(torch.randn(20000, 64, generator=generator)))
        optimizer = CAME(params[-1:], lr=1e-2, kernels="numba")
        for count in counts:
            params[-1].decoupled_grad = torch.randn(20000, 64, generator=generator).bfloat16()
            set_threads(count)
            optimizer.step()
        (choice,) = optimizer._choices.values()
        assert len(choice.backend._room) == counts[-1]
    assert torch.equal(*params)


def test_the_number_of_threads_changes_no_bit(set_threads):
    case = next(case for case in CASES if case.name == "middle of rows")
    results = []
    with mock.patch(TILING, Tiling(8, 16, 64)):
        for count in (1, 2, 3):
            set_threads(count)
            results.append(train(case, "numba", torch.device("cpu"), torch.float32))
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_run_on_pytorchs_threads():
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.threads_probe"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# A step before and one after the fork, in both processes; the parent's must be the child's.
FORKED_SCRIPT = """
import os, signal, sys, torch
from megatron_came import CAME
from megatron_came.kernels import threads
from megatron_came.kernels.dispatch import choose
torch.manual_seed(0)
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.randn(20000, 300))
optimizer = CAME([param], lr=1e-2, kernels="numba")
param.grad = torch.randn(20000, 300)
optimizer.step()
param.grad = torch.randn(20000, 300)
child = os.fork()
signal.alarm(60)
optimizer.step()
bits = param.detach().numpy().tobytes()
if child:
    assert threads.usable() == 2
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


def test_where_pytorchs_threads_cannot_be_reached_one_does_all_and_says_so(
    monkeypatch, set_threads
):
    assert "on one thread" not in choose("numba", torch.device("cpu")).reason
    monkeypatch.setattr(threads, "_parallel", None)
    assert threads.usable() == 1
    choice = choose("numba", torch.device("cpu"))
    assert "on one thread: PyTorch's OpenMP threads cannot be reached" in choice.reason
    case = next(case for case in CASES if case.name == "middle of rows")
    alone = train(case, "numba", torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    set_threads(3)
    together = train(case, "numba", torch.device("cpu"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
