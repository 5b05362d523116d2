"""The names that a checkpoint's pickles may use, and what stands for each."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import torch

from megatron_came.checkpoint_files.records import Dictionary, Maker, Record
from megatron_came.checkpoint_files.tensors import Storage, StorageKind, StoredTensor

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

# Classes whose objects are kept as records: those of arguments, random states and metadata.
_RECORDS = {
    "_io.BytesIO",
    "argparse.Namespace",
    "builtins.complex",
    "builtins.object",
    "builtins.range",
    "builtins.slice",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.dtype",
    "numpy.ndarray",
    "signal.Handlers",
    "signal.Signals",
    "torch.Generator",
    "torch._C.Generator",
    "torch.device",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    "types.SimpleNamespace",
}
# ... and all classes of these: enumerations and configurations among the arguments differ from
# release to release.
_ROOMS = re.compile(
    r"(megatron\.core|megatron\.training|megatron_came|numpy\.dtypes|pathlib"
    r"|transformer_engine\.common\.recipe|torch\.distributed\.checkpoint\.(metadata|planner))"
    r"(\.[a-z_][a-z0-9_]*)*\.[A-Z][A-Za-z0-9_]*"
)


@functools.cache
def stand_in(module: str, name: str) -> Maker | torch.dtype | None:
    """What stands for a name in a pickle, or None if there is none.

    Args:
        module: where the pickle says it lies.
        name: within the module; a class within a class, or a method, has none.
    """
    full = f"{module}.{name}"
    if full in _MAKERS:
        return _MAKERS[full]
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
        return StorageKind(_STORAGES[name])
    if full in _RECORDS or ("." not in name and _ROOMS.fullmatch(full)):
        return Maker(lambda *arguments, **_: Record(full, arguments))
    return None


def _tensor(
    storage: Storage, start: int, shape: Iterable[int], strides: Iterable[int], *_: Any
) -> StoredTensor:
    return StoredTensor(storage, storage.dtype, start, tuple(shape), tuple(strides))


def _typed_tensor(
    storage: Storage,
    start: int,
    shape: Iterable[int],
    strides: Iterable[int],
    requires_grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> StoredTensor:
    return StoredTensor(storage, dtype, start, tuple(shape), tuple(strides))


def _parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter in it is no tensor")
    return tensor


def _of_type(rebuild: Maker, kind: Any, arguments: tuple[Any, ...], state: Any) -> StoredTensor:
    """A tensor with attributes, which are of no use here."""
    if rebuild not in _TENSORS.values():
        raise ValueError("a tensor in it is made by something else")
    tensor: StoredTensor = rebuild.make(*arguments)
    return tensor


def _encode(text: str | bytes, encoding: str = "latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    if encoding != "latin1":
        raise ValueError(f"bytes in it are encoded as {encoding!r:.40}")
    return text.encode("latin1")


def _member(kind: Maker, name: str) -> Record:
    """An enumeration's member by its name, as Python 3.11 pickles it."""
    if not isinstance(kind, Maker) or not isinstance(name, str) or not name.isidentifier():
        raise ValueError("it asks for an attribute of what is no enumeration")
    if name.startswith("_"):
        raise ValueError(f"it asks for the attribute {name}")
    owner = kind.make()
    if not isinstance(owner, Record):
        raise ValueError("it asks for an attribute of what is no enumeration")
    return Record(owner.kind, (name,))


def _instance(kind: Maker, *_: Any) -> Any:
    """An object without arguments, as protocols 0 and 1 make it."""
    if not isinstance(kind, Maker):
        raise ValueError("it makes an object of what is no class")
    return kind.make()


def _array(*_: Any) -> Record:
    return Record("numpy.ndarray")


def _number(dtype: Any, *value: Any) -> Record:
    return Record("numpy.number", (dtype, *value))


_TENSORS = {
    "torch._utils._rebuild_tensor": Maker(_tensor),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor),
    "torch._utils._rebuild_tensor_v3": Maker(_typed_tensor),
}
_MAKERS = {
    **_TENSORS,
    "torch._utils._rebuild_parameter": Maker(_parameter),
    "torch._utils._rebuild_parameter_with_state": Maker(_parameter),
    "torch._tensor._rebuild_from_type_v2": Maker(_of_type),
    "torch.Size": Maker(tuple),
    "torch.Tensor": Maker(lambda *_: Record("torch.Tensor")),
    "torch.nn.parameter.Parameter": Maker(_parameter),
    "collections.OrderedDict": Maker(Dictionary),
    "collections.Counter": Maker(Dictionary),
    "collections.defaultdict": Maker(lambda factory=None, *items: Dictionary(*items)),
    "collections.deque": Maker(lambda items=(), *_: list(items)),
    "builtins.dict": Maker(Dictionary),
    "builtins.list": Maker(list),
    "builtins.tuple": Maker(tuple),
    "builtins.set": Maker(list),
    "builtins.frozenset": Maker(tuple),
    "builtins.bytearray": Maker(lambda text="", encoding="latin1": _encode(text, encoding)),
    "builtins.bytes": Maker(lambda text="", encoding="latin1": _encode(text, encoding)),
    "builtins.getattr": Maker(_member),
    "copyreg._reconstructor": Maker(_instance),
    "_codecs.encode": Maker(_encode),
    **{
        f"{room}.multiarray.{name}": Maker(make)
        for room in ("numpy.core", "numpy._core")
        for name, make in (("_reconstruct", _array), ("scalar", _number))
    },
    **{f"{room}.numeric._frombuffer": Maker(_array) for room in ("numpy.core", "numpy._core")},
}
