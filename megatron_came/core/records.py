"""The record of digests that a checkpoint holds of itself.

It stands under :data:`KEY` of the common state (``torch_dist``) or of every ``model_optim_rng.pt``
(``torch``). It is one string, JSON as :func:`pack` writes it::

    {"format": 1,
     "iteration": 4, "optimizer": "came",
     "step": 4,                       # steps of the optimizer; null without its state
     "tensors": {kind: {name: [[shape], dtype, "digest, 16 hexadecimal digits"]}},
     "copies": {kind: {name: "digest"}},
     "buckets": {key: [[start, [shape], [[name, [place], [size], [offset]], ...]], ...]},
     "checksum": "of all that, without this entry"}

- ``kind`` is ``weights`` (in their own dtype), ``main weights``, ``momentum`` (both as fp32 bits,
  also where the file has bf16) or the key of a factor, such as ``exp_avg_sq_row`` (fp32).
- ``name`` is the parameter's key in the model's sharded state, followed by its indices along the
  axes that Megatron has put before it: ``decoder.layers.mlp.linear_fc1.weight[3]`` is ``[3]`` of
  the tensor ``decoder.layers.mlp.linear_fc1.weight`` in the file (see :func:`.digests.split_name`).
  Of the optimizer's tensors the file has ``optimizer.state.exp_avg.<key>``,
  ``optimizer.state.param.<key>`` or ``optimizer.state.fp32_param.<key>`` and
  ``optimizer.state.<factor>.<key>``, with the same axes before them; where Megatron has several
  optimizers (mixtures of experts), these may begin with ``chained_0.`` or another number. Weights
  of ``fsdp_dtensor`` have ``model.module.`` before the name.
- ``shape`` is that of the whole tensor without these axes; ``dtype`` is ``float32``, but of
  ``weights`` the model's own, such as ``bfloat16``.
- ``copies`` is there for kinds of which each rank saves its own, those in buckets and all of
  ``torch``: of each tensor the sum of all copies but the first, which tensor-parallel ranks and
  pipeline stages with tied embeddings hold. Checkpoints of earlier versions do not have it.
- ``buckets`` is there for Megatron's default format of the distributed optimizer
  (``dp_reshardable``) alone, whose files hold flat buckets ``<key>.param`` and ``<key>.exp_avg``:
  a parameter begins at ``start``, is a flat tensor of ``shape``, and the box of it at ``place`` of
  size ``size`` stands at ``offset`` of the tensor ``name``. :class:`.digests.PlacedBox` takes just
  these. A bucket names a parameter also where another bucket holds a copy of it (tensor-parallel
  ranks, tied embeddings): copies are equal, and each is the whole part.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_came.core.digests import WEIGHTS, PlacedBox, Shape

KEY = "came_digests"
FORMAT = 1


class RecordError(ValueError):
    """A checkpoint's record of digests is damaged; the message says how."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a record says of a tensor: shape and dtype of the whole, and its digest."""

    shape: Shape
    dtype: str
    digest: int


@dataclass(frozen=True, slots=True)
class InBucket:
    """A parameter in a bucket: its first element, its local shape, and its named boxes."""

    start: int
    shape: Shape
    boxes: tuple[tuple[str, PlacedBox], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What a checkpoint says of itself; the module's docstring has its form on disk."""

    iteration: int
    optimizer: str
    step: int | None
    tensors: Mapping[str, Mapping[str, Saved]]
    buckets: Mapping[str, tuple[InBucket, ...]]
    copies: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def pack(record: Record) -> str:
    """Return the string that is saved."""
    content = {
        "format": FORMAT,
        "iteration": record.iteration,
        "optimizer": record.optimizer,
        "step": record.step,
        "tensors": {
            kind: {
                name: [one.shape, one.dtype, f"{one.digest:016x}"] for name, one in named.items()
            }
            for kind, named in record.tensors.items()
        },
        "buckets": {
            key: [
                [one.start, one.shape, [(name, b.place, b.size, b.offset) for name, b in one.boxes]]
                for one in inside
            ]
            for key, inside in record.buckets.items()
        },
    }
    if record.copies:  # a record of an earlier version, rewritten, is as long as it was
        content["copies"] = {
            kind: {name: f"{digest:016x}" for name, digest in named.items()}
            for kind, named in record.copies.items()
        }
    return _canonical({**content, "checksum": _checksum(content)})


def unpack(text: object) -> Record:
    """Read what :func:`pack` has written.

    Raises:
        RecordError: it is damaged, or of a format that this version does not know.
    """
    try:
        content = json.loads(text)  # type: ignore[arg-type]
        checksum = content.pop("checksum")
        if content["format"] != FORMAT:
            raise RecordError(
                f"its digests are of format {content['format']!s:.40}, and this megatron_came "
                f"reads format {FORMAT}"
            )
        if checksum != _checksum(content):
            raise RecordError("its record of digests is damaged")
        tensors = {
            kind: {
                name: Saved(_sizes(shape), _typed(dtype, str), int(digits, 16))
                for name, (shape, dtype, digits) in named.items()
            }
            for kind, named in content["tensors"].items()
        }
        weights = tensors.get(WEIGHTS, {})
        buckets = {
            key: tuple(_in_bucket(start, shape, boxes, weights) for start, shape, boxes in inside)
            for key, inside in content["buckets"].items()
        }
        copies = {
            kind: {name: int(digits, 16) for name, digits in named.items()}
            for kind, named in content.get("copies", {}).items()
        }
        step = content["step"]
        return Record(
            _typed(content["iteration"], int),
            _typed(content["optimizer"], str),
            step if step is None else _typed(step, int),
            tensors,
            buckets,
            copies,
        )
    except RecordError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RecordError("its record of digests cannot be read") from error


def _typed[T](value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} is wanted")
    return value


def _sizes(values: Any) -> Shape:
    if len(values) > 64 or not all(type(size) is int and 0 <= size < 1 << 62 for size in values):
        raise ValueError("a shape is wanted")
    return tuple(values)


def _in_bucket(start: Any, shape: Any, boxes: Any, weights: Mapping[str, Saved]) -> InBucket:
    (first,), local = _sizes([start]), _sizes(shape)
    placed = []
    for name, *numbers in boxes:
        place, size, offset = map(_sizes, numbers)
        whole = weights[name].shape
        for starts, bounds in ((place, local), (offset, whole)):
            if any(s + n > bound for s, n, bound in zip(starts, size, bounds, strict=True)):
                raise ValueError("a box is not within its tensor")
        placed.append((name, PlacedBox(place, size, offset, whole)))
    return InBucket(first, local, tuple(placed))


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.blake2b(_canonical(content).encode(), digest_size=16).hexdigest()
