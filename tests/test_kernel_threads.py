"""The threads that work off a schedule of Numba's kernels."""

import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch

from megatron_came import CAME
from megatron_came.kernels.choice import choose
from megatron_came.kernels.cutting import Tiling
from megatron_came.kernels.numba import threads
from tests.kernel_cases import CASES, train

TILING = "megatron_came.kernels.numba.launch.NumbaKernels.tiling"


def test_every_thread_has_room_for_what_it_widens():
    params, before = [], torch.get_num_threads()
    for counts in ((1, 1), (1, 5)):
        generator = torch.Generator().manual_seed(0)
        params.append(torch.nn.Parameter(torch.randn(2000, 8, generator=generator)))
        optimizer = CAME(params[-1:], lr=1e-2, kernels="numba")
        for count in counts:
            params[-1].decoupled_grad = torch.randn(2000, 8, generator=generator).bfloat16()
            try:
                torch.set_num_threads(count)
                optimizer.step()
            finally:
                torch.set_num_threads(before)
        (choice,) = optimizer._choices.values()
        assert len(choice.kernels._room) == counts[-1]
    assert torch.equal(*params)


def test_the_number_of_threads_changes_no_bit():
    case = next(case for case in CASES if case.name == "middle of rows")
    results, before = [], torch.get_num_threads()
    with mock.patch(TILING, Tiling(8, 16, 64)):
        for threads in (1, 2, 3):
            try:
                torch.set_num_threads(threads)
                results.append(train(case, "numba", torch.device("cpu"), torch.float32))
            finally:
                torch.set_num_threads(before)
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# A step before and one after the fork, in both processes; each writes what it has then.
FORKED_SCRIPT = """
import os, sys, torch
from megatron_came import CAME
from megatron_came.kernels.numba import threads
torch.manual_seed(0)
torch.set_num_threads(2)
param = torch.nn.Parameter(torch.randn(2000, 300))
optimizer = CAME([param], lr=1e-2, kernels="numba")
for _ in range(2):
    param.grad = torch.randn(2000, 300)
    optimizer.step()
    if _ == 0:
        child = os.fork()
        assert threads.usable() == (2 if child else 1)
bits = param.detach().numpy().tobytes().hex()
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert open(sys.argv[1]).read() == bits
else:
    open(sys.argv[1], "w").write(bits)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(tmp_path):
    command = [sys.executable, "-c", FORKED_SCRIPT, tmp_path / "bits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_openmp_one_thread_does_all_and_says_so(monkeypatch):
    monkeypatch.setattr(threads, "_parallel", None)
    assert threads.usable() == 1
    choice = choose("numba", torch.device("cpu"))
    assert "on one thread: this PyTorch has no OpenMP" in choice.reason
    case = next(case for case in CASES if case.name == "middle of rows")
    alone = train(case, "numba", torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    together = train(case, "numba", torch.device("cpu"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_pytorch_has_openmp():
    """As its builds for Linux do; otherwise the other tests here would test nothing."""
    assert "one thread" not in choose("numba", torch.device("cpu")).reason
