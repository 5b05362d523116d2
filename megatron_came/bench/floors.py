"""How fast a CPU's memory can be for an optimizer: bare loops with the traffic of its passes.

A processor reads and writes at different speeds, so that the bandwidth of a copy fits none.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from megatron_came.kernels.cpu import threads

_ELEMENTS = 32 * 1024 * 1024  # far beyond any cache
_TURNS = 5  # of which the fastest counts


# The loops are functions of their own: one that does not begin at 0 is not vectorised.


def _on_threads(some):
    """Compile a loop to run on so many threads, each of which has its part of the arrays."""
    inline = njit(fastmath=True, forceinline=True)(some)  # sums in any order, as vectors are

    @njit(fastmath=True, parallel=True)
    def all_of_them(p, m, v, g, count):
        total = np.float32(0)
        for t in prange(count):
            low, high = g.size * t // count, g.size * (t + 1) // count
            total += inline(p[low:high], m[low:high], v[low:high], g[low:high])
        return total

    return all_of_them


@_on_threads
def _read(p, m, v, g):
    total = np.float32(0)
    for i in range(g.size):
        total += g[i]
    return total


@_on_threads
def _read_two(p, m, v, g):
    total = np.float32(0)
    for i in range(g.size):
        total += g[i] * np.float32(m[i])
    return total


@_on_threads
def _update(p, m, v, g):
    for i in range(p.size):
        momentum = np.float32(0.5) * np.float32(m[i]) + g[i]
        m[i] = momentum
        p[i] -= np.float32(1e-5) * momentum
    return np.float32(0)


@_on_threads
def _adam(p, m, v, g):
    for i in range(p.size):
        momentum, square = m[i] + g[i], v[i] + g[i] * g[i]
        m[i], v[i] = momentum * np.float32(0.5), square * np.float32(0.5)
        p[i] -= np.float32(1e-5) * momentum * square
    return np.float32(0)


_PASSES: dict[str, Sequence[Callable[..., Any]]] = {
    "came": (_read, _read_two, _update),
    "adam": (_adam,),
}


@cache
def seconds_per_parameter(traffic: str, momentum: torch.dtype) -> float:
    """Return the least time that the passes of an optimizer take, on PyTorch's number of threads.

    Args:
        traffic: "came" or "adam", gradients and weights in fp32.
        momentum: dtype of the momentum.
    """
    passes = _PASSES[traffic]
    p, v, g = (torch.full((_ELEMENTS,), 1e-3).numpy() for _ in range(3))
    # NumPy knows no bf16; the loops move as many bytes of integers.
    dtype = torch.int16 if momentum == torch.bfloat16 else momentum
    m = torch.zeros(_ELEMENTS, dtype=dtype).numpy()
    count, total = threads.usable(), 0.0
    with threads.pool(count):
        for one in passes:
            times = []
            for _ in range(1 + _TURNS):  # the first compiles
                start = time.perf_counter()
                one(p, m, v, g, count)
                times.append(time.perf_counter() - start)
            total += min(times[1:])
    return total / _ELEMENTS
