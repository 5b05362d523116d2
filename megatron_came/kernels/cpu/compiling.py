"""How kernels are compiled: once for one thread, once for several; and numbers that they share."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,attr-defined"

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from megatron_came.core import factors, passes
from megatron_came.kernels.cpu.keeping import keep

_OPTIONS = {"error_model": "numpy"}  # as in PyTorch, a division by zero gives infinity or NaN
# What a kernel calls becomes part of it. A function of its own would be found by name in whatever
# machine code was loaded first, and results would differ in the last bits.
_inlined = partial(njit, **_OPTIONS, forceinline=True)
inline = _inlined()
# Sums may be reordered, but NaN and infinity keep their meaning.
fast = _inlined(fastmath={"reassoc", "contract", "nsz"})
elementwise = _inlined(fastmath={"contract"})

ONE = np.float32(1.0)
SQUARE_SCALE, SQUARE_UNSCALE = np.float32(passes.SQUARE_SCALE), passes.SQUARE_SCALE**-2
UPDATE_SCALE, UPDATE_UNSCALE = np.float32(passes.UPDATE_SCALE), passes.UPDATE_SCALE**-2
# See megatron_came.core.factors.
LARGEST_MEAN = factors.largest_mean(torch.float32)
LEAST_RATIO = np.float32(factors.LEAST_RATIO)
BAD_GUESS = factors.BAD_GUESS


def serial(function: Callable[..., Any]) -> Any:
    """Compile a function for one thread."""
    return keep(njit(**_OPTIONS, nogil=True)(function))


class Kernel:
    """A function that shares its work among threads with ``prange``.

    Args:
        function: whose last parameter is the number of threads; the numbers it computes do not
            depend on it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._serial = serial(function)
        self._parallel = keep(njit(**_OPTIONS, nogil=True, parallel=True)(function), "parallel")

    def __call__(self, *arguments: Any, threads: int) -> None:
        """Compute on so many threads, which :func:`threads.pool` has made ready."""
        # A pool, even of one thread, would be started by the parallel one.
        (self._serial if threads == 1 else self._parallel)(*arguments, threads)


def _pointer(dtype):
    """Return an intrinsic that turns an address into a pointer."""

    @intrinsic
    def pointer(_context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(address), generate

    return pointer


to_int64 = _pointer(types.int64)
to_int32 = _pointer(types.int32)
to_int16 = _pointer(types.int16)
