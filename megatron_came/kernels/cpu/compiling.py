"""How kernels are compiled: once for one thread, once for several; and numbers that they share.

What is compiled is kept on the disk; where that fails, it is compiled in memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,attr-defined"

import contextlib
import hashlib
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps
from numba.extending import intrinsic

from megatron_came.core import factors, int8, passes, rounding
from megatron_came.voice import warn_once

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


# Keeping.

# Of all that kernels are made from: Numba looks at one file alone. Read when they are imported:
# the files may have changed by the time that the first is compiled.
_CORE = (factors, int8, passes, rounding)
_FILES = [
    *sorted(Path(__file__).parent.glob("*.py")),
    *(Path(str(each.__file__)) for each in _CORE),
]
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()


class _Checked(CompileResultCacheImpl):
    """Numba's form of what is kept, with a digest: machine code that a disk has changed runs."""

    def reduce(self, data):
        content = dumps(super().reduce(data))
        return hashlib.sha256(content).digest(), content

    def rebuild(self, target_context, payload):
        digest, content = payload
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("the digest is another one")
        return super().rebuild(target_context, pickle.loads(content))


class _Cache(FunctionCache):
    """Numba's, but what cannot be loaded is compiled anew, and what cannot be saved is not.

    ``variant`` tells apart what is compiled from the same function in several ways.
    """

    _impl_class = _Checked

    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        super().__init__(function)
        self._variant = variant

    def _index_key(self, sig, codegen):
        return (*super()._index_key(sig, codegen), self._variant, _SOURCES)

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # pickle raises anything
            warn_once(
                f"What Numba had kept of CAME's kernels in {self.cache_path} was damaged "
                f"({_reason(error)}), so they were compiled anew."
            )
            with contextlib.suppress(OSError):
                self.flush()  # else the damaged index would be read again, to save what is made
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn_of_memory(error, f" in {self.cache_path}")


def keep(dispatcher: Any, variant: str = "") -> Any:
    """Let what ``njit`` returns be loaded from its cache, if it is there and whole."""
    try:
        dispatcher._cache = _Cache(dispatcher.py_func, variant)
    except Exception as error:  # no folder for it, or a variable of Numba's names nonsense
        _warn_of_memory(error, "")
    return dispatcher


def _warn_of_memory(error: Exception, where: str) -> None:
    warn_once(
        f"CAME's kernels are compiled in memory, as Numba cannot keep them{where} "
        f"({_reason(error)}): let NUMBA_CACHE_DIR name a folder that can be written, with room for "
        "a few MiB, to start faster."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "no locator available" in str(error):
        return "no folder can be written"
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
