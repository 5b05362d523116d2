"""Keeping compiled functions on the disk: where that fails, they are compiled in memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,attr-defined"

import contextlib
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

from megatron_came.core import factors, int8, passes, rounding
from megatron_came.voice import warn_once

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
