"""PyTorch's own threads, through Numba's OpenMP layer.

After parallel work they wait awake for more, for milliseconds, and so they do when a step begins
right after a backward pass: threads of Numba's own would have to share the processors with them.
Where PyTorch is imported before Numba, both use the same OpenMP library and so the same threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_PROCESS = os.getpid()
_lock = threading.Lock()  # without OpenMP Numba ends the process at two parallel calls at once


def is_forked() -> bool:
    """Whether this process was forked from one that had loaded CAME.

    GNU's OpenMP would wait for ever for threads that the parent alone has.
    """
    return os.getpid() != _PROCESS


def usable() -> int:
    """Return on how many threads kernels run: as many as PyTorch's operations, where they can."""
    wanted = torch.get_num_threads()
    if wanted == 1 or is_forked():
        return 1
    from numba import config

    return min(wanted, int(config.NUMBA_NUM_THREADS))


@contextmanager
def pool(count: int) -> Iterator[None]:
    """Let parallel kernels run on so many threads; with one, nothing is started."""
    if count == 1:
        yield
        return
    import numba

    with _lock:
        _start()
        before = numba.get_num_threads()
        numba.set_num_threads(count)  # of this thread of Python's
        try:
            yield
        finally:
            numba.set_num_threads(before)


@cache
def _start() -> str | None:
    """Start Numba's pool; return what is wrong with it, in a sentence."""
    import numba

    before = torch.get_num_threads()
    other = int(numba.config.NUMBA_NUM_THREADS) + 1
    torch.set_num_threads(other)
    numba.get_num_threads()  # starts it, and sets the number of threads of its OpenMP library
    is_shared = torch.get_num_threads() != other
    torch.set_num_threads(before)
    layer = numba.threading_layer()
    if layer == "workqueue":
        return (
            "Numba has found no OpenMP library, and its own threads are slower beside PyTorch's: "
            "install libgomp (or tbb)."
        )
    if layer == "omp" and not is_shared:
        return "Numba's threads are not PyTorch's, which is slower: import torch before numba."
    return None


def note() -> str:
    """Return what slows kernels on this process's threads, in a sentence; empty if nothing."""
    if is_forked():
        return "All is done on one thread: this process was forked from one that had loaded CAME."
    if usable() == 1:
        return ""
    with _lock:
        return _start() or ""
