"""The names that a checkpoint's pickles may use, and what stands for each: data, and no code."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch

from megatron_came.checkpoint_files.errors import shown
from megatron_came.checkpoint_files.tensors import Storage, StoredTensor


class Maker:
    """What stands for a function, or a class of no stand-ins, that a pickle names."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make what stands for the result."""
        return self.make(*args, **kwargs)

    def __setstate__(self, _: Any) -> None:
        raise ValueError("it sets the state of what is no object")


class StorageKind(Maker):
    """What stands for a class of storages; a pickle refers to one, and never calls it."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(class_of("torch.storage"))
        self.dtype = dtype


class StandIn:
    """What stands for an object, whatever a pickle makes it of.

    Attributes:
        kind: full name of its class, which a subclass stands for.
        fields: its attributes, by name.
    """

    __slots__ = ("fields",)
    kind = ""
    fields: dict[str, Any]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make one without attributes."""
        made = object.__new__(cls)
        made.fields = {}
        return made

    def __setstate__(self, state: Any) -> None:
        """Take the state that the pickle gives: attributes, or what the class makes them of."""
        named = state if isinstance(state, dict) else {"state": state}
        self.fields.update((key, value) for key, value in named.items() if isinstance(key, str))

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.fields.get(name, default)

    def __repr__(self) -> str:
        return f"<{self.kind}>"


@functools.cache
def class_of(kind: str) -> type[StandIn]:
    """What stands for a class, by its full name."""
    return type("StandIn", (StandIn,), {"__slots__": (), "kind": kind})


def makes(thing: Any) -> bool:
    """Whether it stands for a class or function."""
    return isinstance(thing, Maker) or (isinstance(thing, type) and issubclass(thing, StandIn))


class Dictionary(dict[Any, Any]):
    """What stands for ``OrderedDict`` and its like."""


_DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
}
# Storages are pickled under these names; a type without one has UntypedStorage's.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
# Classes whose objects are kept as stand-ins: those of arguments, random states and metadata.
_CLASSES = """
    _io.BytesIO argparse.Namespace builtins.complex builtins.object builtins.range builtins.slice
    datetime.date datetime.datetime datetime.timedelta numpy.dtype numpy.ndarray signal.Handlers
    signal.Signals torch.Generator torch._C.Generator torch.Tensor torch.device
    torch.distributed.checkpoint.filesystem._StorageInfo
    torch.distributed.checkpoint.filesystem._StoragePrefix
    torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING torch.serialization._get_layout
    types.SimpleNamespace
"""
# ... and all classes of these: enumerations and configurations among the arguments differ from
# release to release.
_ROOMS = re.compile(
    r"(megatron\.core|megatron\.training|megatron_came|numpy\.dtypes|pathlib"
    r"|transformer_engine\.common\.recipe|torch\.distributed\.checkpoint\.(metadata|planner))"
    r"(\.[a-z_][a-z0-9_]*)*\.[A-Z][A-Za-z0-9_]*"
)


@functools.cache
def stand_in(module: str, name: str) -> Maker | type[StandIn] | torch.dtype | None:
    """What stands for a name in a pickle, or None, as for a class within a class or a method."""
    full = f"{module}.{name}"
    if full in _MAKERS:
        return _MAKERS[full]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
        return StorageKind(_STORAGES[name])
    if full in _CLASSES.split() or ("." not in name and _ROOMS.fullmatch(full)):
        return class_of(full)
    return None


def _tensor(
    storage: Storage, start: int, shape: Iterable[int], strides: Iterable[int], *more: Any
) -> StoredTensor:
    """A tensor; those of dtypes without a storage of their own bring the dtype."""
    dtype = next((each for each in more if isinstance(each, torch.dtype)), storage.dtype)
    return StoredTensor(storage, dtype, start, tuple(shape), tuple(strides))


def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter in it is no tensor")
    return tensor


def _of_type(rebuild: Maker, kind: Any, arguments: tuple[Any, ...], state: Any) -> StoredTensor:
    """A tensor with attributes, which are of no use here."""
    if rebuild is not _TENSOR:
        raise ValueError("a tensor in it is made by something else")
    return _tensor(*arguments)


def _encode(text: str | bytes = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in it are encoded as {shown(encoding)}")
    return text if isinstance(text, bytes) else text.encode("latin1")


def _member(kind: Any, name: str) -> StandIn:
    """An enumeration's member by its name, as Python 3.11 pickles it."""
    owner = kind() if makes(kind) else None
    if not isinstance(owner, StandIn) or not isinstance(name, str) or not name.isidentifier():
        raise ValueError("it asks for an attribute of what is no enumeration")
    if name.startswith("_"):  # __class__, say, from which all of Python can be reached
        raise ValueError(f"it asks for the attribute {name}")
    return class_of(owner.kind)()


def _instance(kind: Any, *_: Any) -> Any:
    """An object without arguments, as protocols 0 and 1 make it."""
    if not makes(kind):
        raise ValueError("it makes an object of what is no class")
    return kind()


_TENSOR, _PARAMETER, _BYTES = Maker(_tensor), Maker(_parameter), Maker(_encode)
_DICTIONARY, _LIST, _TUPLE = Maker(Dictionary), Maker(list), Maker(tuple)
_ARRAY, _NUMBER = class_of("numpy.ndarray"), class_of("numpy.number")
_MAKERS: dict[str, Maker | type[StandIn]] = {
    "torch._utils._rebuild_tensor": _TENSOR,
    "torch._utils._rebuild_tensor_v2": _TENSOR,
    "torch._utils._rebuild_tensor_v3": _TENSOR,
    "torch._utils._rebuild_parameter": _PARAMETER,
    "torch._utils._rebuild_parameter_with_state": _PARAMETER,
    "torch.nn.parameter.Parameter": _PARAMETER,
    "torch._tensor._rebuild_from_type_v2": Maker(_of_type),
    "torch.Size": _TUPLE,
    "collections.OrderedDict": _DICTIONARY,
    "collections.Counter": _DICTIONARY,
    "collections.defaultdict": Maker(lambda factory=None, *items: Dictionary(*items)),
    "collections.deque": Maker(lambda items=(), *_: list(items)),
    "builtins.dict": _DICTIONARY,
    "builtins.list": _LIST,
    "builtins.tuple": _TUPLE,
    "builtins.set": _LIST,
    "builtins.frozenset": _TUPLE,
    "builtins.bytearray": _BYTES,
    "builtins.bytes": _BYTES,
    "builtins.getattr": Maker(_member),
    "copyreg._reconstructor": Maker(_instance),
    "_codecs.encode": _BYTES,
    "numpy.core.multiarray._reconstruct": _ARRAY,
    "numpy.core.multiarray.scalar": _NUMBER,
    "numpy.core.numeric._frombuffer": _ARRAY,
    "numpy._core.multiarray._reconstruct": _ARRAY,  # NumPy 2's
    "numpy._core.multiarray.scalar": _NUMBER,
    "numpy._core.numeric._frombuffer": _ARRAY,
}
