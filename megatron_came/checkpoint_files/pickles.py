"""A restricted unpickler: what a pickle names is never imported, called or given a state.

A pickle is a program that may call whatever can be imported. Here each name that it may use stands
in :mod:`megatron_came.checkpoint_files.names`, and leads to an inert stand-in of this package, not
to the class of that name. So there is nothing to abuse, whichever arguments or states a file gives
to which name; all other names are refused.

Python's own unpickler in Python is the base, since the one in C lets a file of ten bytes take
gigabytes of memory: to that are left the metadata alone that Megatron unpickles right afterwards.
"""

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from megatron_came.checkpoint_files import names
from megatron_came.checkpoint_files.errors import (
    CheckpointError,
    ForeignClassError,
    cannot_be_read,
    printable,
)
from megatron_came.checkpoint_files.names import Dictionary, StandIn

# Of a key, tuples within tuples and bits of a number: each time that it is looked up, all of it is
# hashed, without asking how deep it is or how often it has been seen.
_KEY_SIZE, _KEY_BITS = 64, 64
_FLAT = (str, bytes, int, float, complex, type(None), torch.dtype, StandIn)

PersistentLoad = Callable[[Any], Any]


def load(
    data: bytes,
    source: str,
    persistent_load: PersistentLoad | None = None,
    *,
    quick: bool = False,
) -> Any:
    """Read a pickle as data.

    Args:
        data: the pickle.
        source: its file, for messages.
        persistent_load: makes of a persistent id what stands for it; none may be there without.
        quick: let it take any time and memory, as whoever unpickles it afterwards does.

    Returns:
        Python's own containers, numbers and strings, ``torch.dtype``,
        :class:`~megatron_came.checkpoint_files.tensors.StoredTensor` and, for everything else,
        :class:`~megatron_came.checkpoint_files.names.StandIn`.

    Raises:
        ForeignClassError: it names what Megatron does not write.
        CheckpointError: it is no pickle, is truncated, or does what no pickle of Megatron's does.
    """
    try:
        if quick:
            return _QuickUnpickler(data, source).load()
        return _Unpickler(data, source, persistent_load).load()
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(
            f"{source} cannot be read, since memory ran out: give more of it; if that does not "
            "help, it is damaged: take it from a copy, or another iteration (--ckpt-step)."
        ) from error
    except (Exception, RecursionError) as error:
        raise cannot_be_read(source, f"{type(error).__name__}: {error}") from error


def _found(module: str, name: str, source: str) -> Any:
    """Return what stands for a name."""
    found = names.stand_in(module, name)
    if found is None:
        full = printable(f"{module}.{name}"[:100])
        raise ForeignClassError(
            f"{source} names {full}, which Megatron does not "
            "write into checkpoints and which may run code where the file is loaded (it was "
            "not run here): do not load this checkpoint, unless you know who wrote it and why "
            "that is in it."
        )
    return found


class _QuickUnpickler(pickle.Unpickler):
    """That of C, with the same names: nothing is run, whatever a file asks for."""

    def __init__(self, data: bytes, source: str) -> None:
        super().__init__(io.BytesIO(data))
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        return _found(module, name, self._source)


class _Unpickler(pickle._Unpickler):
    """Python's, with each step that could run something replaced."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    metastack: list[list[Any]]
    proto: int = 0

    def __init__(self, data: bytes, source: str, persistent_load: PersistentLoad | None) -> None:
        super().__init__(io.BytesIO(data))
        self._source = source
        self._persistent = persistent_load
        self._budget = len(data)  # what may be copied: without it few bytes take gigabytes

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to storages outside of itself")
        return self._persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # such pickles have Python 2's names
            module, name = NAME_MAPPING.get((module, name), (module, name))
            module = IMPORT_MAPPING.get(module, module)
        return _found(module, name, self._source)

    def _call(self, function: Any, arguments: Any, named: dict[str, Any] | None = None) -> Any:
        """Make what a stand-in makes; what it copies is paid for with the file's bytes."""
        if not names.makes(function) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls what is no class or function")
        named = named or {}
        self._pay(*arguments, named, *named.values())
        return function(*arguments, **named)

    def _pay(self, *copied: Any) -> None:
        self._budget -= sum(len(each) for each in copied if hasattr(each, "__len__"))
        if self._budget < 0:
            raise pickle.UnpicklingError("it multiplies what is in it")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    load_newobj = load_reduce

    def load_newobj_ex(self) -> None:
        named = self.stack.pop()
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments, named)

    def load_build(self) -> None:
        state = self.stack.pop()
        thing = self.stack[-1]
        if isinstance(thing, StandIn):
            self._pay(state)
            thing.__setstate__(state)
        elif not isinstance(thing, Dictionary):  # whose attributes are of no use here
            raise pickle.UnpicklingError("it sets the state of what is no object")

    def load_setitem(self) -> None:
        _check_items(self.stack[-3], self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        _check_items(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()  # type: ignore[misc]


def _check_items(thing: Any, keys: list[Any]) -> None:
    _check_keys(keys)
    if not isinstance(thing, dict):
        raise pickle.UnpicklingError("it sets items of what is no dictionary")


def _check_keys(keys: list[Any]) -> None:
    """Refuse keys whose hash or comparison could take more than a moment."""
    for key in keys:
        waiting, count = [key], 0
        while waiting:
            each, count = waiting.pop(), count + 1
            is_long = isinstance(each, int) and each.bit_length() > _KEY_BITS
            is_tuple = isinstance(each, tuple) and len(each) <= _KEY_SIZE
            if count > _KEY_SIZE or is_long or not (is_tuple or isinstance(each, _FLAT)):
                raise pickle.UnpicklingError(f"a {type(key).__name__} is a key in it")
            waiting += each if is_tuple else ()


_REPLACED = ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD")
_CHECKED = ("SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET")
for _name in _REPLACED + _CHECKED:
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = getattr(_Unpickler, f"load_{_name.lower()}")
# What Megatron never writes: classes of Python 1 and 2, the process's registry, outside buffers.
for _name in ["INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"]:
    del _Unpickler.dispatch[getattr(pickle, _name)[0]]
