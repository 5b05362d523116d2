"""Run in a process of its own: how many of the system's threads the kernels start.

    python -m tests.support.threads_probe

Numba's kernels and PyTorch's operations take turns; after the first parallel work no thread may
start or end, and with one thread, which it has first, there must not be a second.
"""

import os

import torch

from megatron_came import CAME
from megatron_came.kernels.cpu import threads


def threads_of_process() -> set[int]:
    """The system's numbers of all threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def main(count: int) -> None:
    torch.set_num_threads(count)
    param = torch.nn.Parameter(torch.randn(3000, 40))
    param.grad = torch.randn(3000, 40)
    optimizer = CAME([param], lr=1e-2, kernels="numba")
    alone = threads_of_process()
    torch.ones(2**22).sum()
    before = threads_of_process()
    assert len(before - alone) == count - 1
    usable = threads.usable()
    for work in (optimizer.step, lambda: torch.ones(2**22).sum(), optimizer.step):
        work()
        assert threads_of_process() == before, work
        assert torch.get_num_threads() == count
    if count == 1:
        assert threads._start.cache_info().currsize == 0
    else:
        assert usable == count or usable == len(os.sched_getaffinity(0))


if __name__ == "__main__":
    for count in (1, 2):
        main(count)
