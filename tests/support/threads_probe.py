"""Run in a process of its own: which of the system's threads the kernels run on.

Numba's kernels and PyTorch's operations take turns; after the first parallel work no thread may
start or end.
"""

import ctypes
import os
import threading

import torch

from megatron_came import CAME
from megatron_came.kernels.cpu import threads

COUNT = 4


def threads_of_process() -> set[int]:
    """The system's numbers of all threads."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def threads_that_come() -> set[int]:
    """Let the kernels' threads say who they are."""
    come: list[int] = []
    note = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: come.append(threading.get_native_id()))
    address = ctypes.cast(note, ctypes.c_void_p).value
    assert address is not None
    threads.run(address, 0, COUNT)
    assert len(come) == len(set(come)) == COUNT, come
    return set(come)


def main() -> None:
    torch.set_num_threads(COUNT)
    # Two strips: fewer rows than there are threads.
    param = torch.nn.Parameter(torch.randn(128, 40))
    param.grad = torch.randn(128, 40)
    optimizer = CAME([param], lr=1e-2, kernels="numba")
    before = threads_of_process()
    come = threads_that_come()
    assert threads_of_process() == before | come
    for work in (lambda: torch.ones(2**22).sum(), optimizer.step, optimizer.step):
        work()
        assert threads_of_process() == before | come, work
    assert threads_that_come() == come


if __name__ == "__main__":
    main()
