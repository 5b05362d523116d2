"""PyTorch's own threads, those of its OpenMP library, for kernels on CPUs.

After parallel work they wait awake for more, for milliseconds, and so they do when a step begins
right after a backward pass: threads of our own would have to share the processors with them.

In a forked process GNU's OpenMP waits for ever for threads that the parent alone has. Kernels use
one thread there, if the parent had imported this module; PyTorch's own operations are not so
careful.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _entry_point() -> Any:
    """Find what starts OpenMP's threads, in the library that PyTorch uses; None if it cannot be.

    GNU's name, which LLVM's and Intel's libraries have as well.
    """
    if os.name != "posix":
        return None
    # As the loader does for PyTorch: what was preloaded first.
    for library in (None, torch._C.__file__):
        found = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
        if found is not None:
            found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            found.restype = None
            return found
    return None


_parallel = _entry_point()
_PROCESS = os.getpid()


def obstacle() -> str | None:
    """Why this process cannot use PyTorch's threads, if so."""
    if _parallel is None:
        return "PyTorch's OpenMP threads cannot be reached"
    if os.getpid() != _PROCESS:
        return "this process was forked from one that had loaded CAME"
    return None


def usable() -> int:
    """Return as many threads as PyTorch uses; one, where there is an :func:`obstacle`."""
    return torch.get_num_threads() if obstacle() is None else 1


def run(function: int, argument: int, threads: int) -> None:
    """Call a function on several threads at once; return when all calls have.

    There may be fewer calls, where OpenMP is told to have fewer threads.

    Args:
        function: address of ``void function(void *argument)``, which needs no lock of Python's.
        argument: address.
        threads: 1, or as many as are :func:`usable`. With fewer, GNU's library would end the rest
            and PyTorch's next operation start them again (pytorch/pytorch#32008).
    """
    if threads == 1:
        _Function(function)(argument)
    else:
        _parallel(function, argument, threads, 0)
