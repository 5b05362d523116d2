"""PyTorch's own threads, those of its OpenMP library.

After its parallel work these wait awake for more, for milliseconds, as does a backward pass's last
operation when the step begins: threads of our own would have to share the processors with them.
"""

from __future__ import annotations

import ctypes
import os

import torch
from numba.core.ccallback import CFunc

# Looked up in the libraries that PyTorch has loaded; LLVM's and Intel's OpenMP have it as well.
_parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
if _parallel is not None:
    _parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _parallel.restype = None
_PROCESS = os.getpid()


def has_openmp() -> bool:
    """Whether PyTorch has threads that can be used."""
    return _parallel is not None


def usable() -> int:
    """Return how many threads PyTorch uses, if they can be used.

    Without OpenMP that is one, and so it is in a process that was forked: OpenMP would wait there
    for threads that the parent alone has.
    """
    return torch.get_num_threads() if has_openmp() and os.getpid() == _PROCESS else 1


def run(function: CFunc, argument: int, threads: int) -> None:
    """Call a function on as many threads at once; return when all calls have.

    Args:
        function: of one address, returns nothing.
        argument: the address.
        threads: no more than are :func:`usable`.
    """
    if threads == 1 or _parallel is None:
        function.ctypes(argument)
    else:
        _parallel(function.address, argument, threads, 0)
