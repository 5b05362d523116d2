"""PyTorch's own threads, through Numba's OpenMP layer.

After parallel work they wait awake for more, for milliseconds, and so they do when a step begins
right after a backward pass: threads of Numba's own would have to share the processors with them.
Where PyTorch is imported before Numba, both use the same OpenMP library and so the same threads.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from megatron_came.voice import warn_once

_PROCESS = os.getpid()
_lock = threading.Lock()  # without OpenMP Numba ends the process at two parallel calls at once


def is_forked() -> bool:
    """Whether this process was forked from one that had loaded CAME.

    GNU's OpenMP would wait for ever for threads that the parent alone has.
    """
    return os.getpid() != _PROCESS


def usable() -> int:
    """Return on how many threads kernels run: as many as PyTorch's operations, where they can.

    The first call for more than one starts them, and no earlier one: after that a child that is
    forked cannot use them, nor can what else it does with Numba.
    """
    wanted = torch.get_num_threads()
    if wanted == 1 or is_forked():
        return 1
    with _lock:
        if not _start():
            return 1
    from numba import config

    return min(wanted, int(config.NUMBA_NUM_THREADS))


@contextmanager
def pool(count: int) -> Iterator[None]:
    """Let parallel kernels run on so many threads, no more than :func:`usable` has said."""
    if count == 1:
        yield
        return
    import numba

    with _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(count)  # of this thread of Python's
        try:
            yield
        finally:
            numba.set_num_threads(before)


@cache
def _start() -> bool:
    """Start Numba's threads; where they are none or slow, warn. Return whether there are any."""
    import numba
    from numba.np.ufunc import parallel

    was_running = getattr(parallel, "_is_initialized", False)
    before = torch.get_num_threads()
    other = int(numba.config.NUMBA_NUM_THREADS) + 1
    torch.set_num_threads(other)
    try:
        numba.get_num_threads()  # starts them, and sets the number of its OpenMP library's
        is_shared = was_running or torch.get_num_threads() != other
        layer = numba.threading_layer()
    except Exception as error:  # a layer that a variable names and that is not there
        warn_once(
            "CAME's kernels run on one thread, as Numba's could not be started "
            f"({str(error).partition('.')[0]}): unset NUMBA_THREADING_LAYER."
        )
        return False
    finally:
        torch.set_num_threads(before)
    if layer == "workqueue":
        warn_once(
            "CAME's kernels: Numba has found no OpenMP library, and its own threads are slower "
            "beside PyTorch's: install libgomp (or tbb)."
        )
    elif layer == "omp" and not is_shared:
        warn_once(
            "CAME's kernels: Numba's threads are not PyTorch's, which is slower: import torch "
            "before numba."
        )
    return True
