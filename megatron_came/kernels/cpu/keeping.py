"""Keeping a compiled function on the disk: where that fails, it is compiled in memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,attr-defined"

from __future__ import annotations

import contextlib
import hashlib
import pickle
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cfunc
from numba.core import sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.serialize import dumps

# As in PyTorch, a division by zero gives infinity or NaN.
_OPTIONS = {"error_model": "numpy"}


class Compiled(NamedTuple):
    """A compiled function.

    Attributes:
        function: what C and ``ctypes`` can call.
        note: what did not go as it should, in a sentence; empty if all did.
    """

    function: CFunc
    note: str = ""


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
    """Numba's, but what cannot be loaded is compiled anew, and what cannot be saved is not."""

    _impl_class = _Checked
    damage: Exception | None = None
    obstacle: Exception | None = None

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # pickle raises anything
            self.damage = error
            with contextlib.suppress(OSError):
                self.flush()  # else the damaged index would be read again, to save what is made
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self.obstacle = error


def compile_and_keep(function: Callable[..., Any], signature: Any) -> Compiled:
    """Compile a function, or load it from Numba's cache, if it is there and whole.

    Args:
        function: of Python.
        signature: Numba's.
    """
    start = time.monotonic()
    try:
        cache = _Cache(function)
    except Exception as error:  # no folder for it, or a variable of Numba's names nonsense
        compiled = cfunc(signature, **_OPTIONS)(function)
        return Compiled(compiled, _not_kept(error, "", time.monotonic() - start))
    compiled = CFunc(function, sigutils.normalize_signature(signature), {}, dict(_OPTIONS))
    compiled._cache = cache
    compiled.compile()
    if cache.obstacle is not None:
        where = f" in {cache.cache_path}"
        return Compiled(compiled, _not_kept(cache.obstacle, where, time.monotonic() - start))
    if cache.damage is not None:
        return Compiled(
            compiled,
            f"What Numba had kept of them in {cache.cache_path} was damaged"
            f" ({_reason(cache.damage)}), so they were compiled anew.",
        )
    return Compiled(compiled)


def _not_kept(error: Exception, where: str, seconds: float) -> str:
    return (
        f"They were compiled in memory, in {seconds:.0f} s, as Numba cannot keep them{where}"
        f" ({_reason(error)}): let NUMBA_CACHE_DIR name a folder that can be written, with room"
        " for a few MiB, to start faster."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "no locator available" in str(error):
        return "no folder can be written"
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
