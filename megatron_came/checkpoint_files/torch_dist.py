"""Checkpoints of ``--ckpt-format torch_dist``: what ``torch.distributed.checkpoint`` writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from megatron_came.checkpoint_files import pickles
from megatron_came.checkpoint_files.archives import Archive, open_regular
from megatron_came.checkpoint_files.errors import CheckpointError, cannot_be_read
from megatron_came.checkpoint_files.records import Record
from megatron_came.checkpoint_files.stored import Box
from megatron_came.checkpoint_files.tensors import StoredTensor

Shape = tuple[int, ...]
METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Item:
    """Where something lies.

    Attributes:
        file: path of the shard file.
        start: of the first byte in it.
        length: in bytes.
    """

    file: Path
    start: int
    length: int

    def load(self) -> Any:
        """Read an object that is no tensor."""
        with Archive(self.file, self.start, self.length) as archive:
            return archive.load()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor.

    Attributes:
        offsets: of its first element in the tensor.
        sizes: its shape.
        item: where it lies.
    """

    offsets: Shape
    sizes: Shape
    item: Item

    def open(self) -> Archive:
        """The archive that holds it."""
        return Archive(self.item.file, self.item.start, self.item.length)

    def stored(self, archive: Archive, name: str, dtype: torch.dtype) -> StoredTensor:
        """The chunk in its opened archive.

        Raises:
            CheckpointError: it is not what the metadata says.
        """
        found = archive.load()
        if not isinstance(found, StoredTensor) or found.shape != self.sizes:
            raise CheckpointError(
                f"{self.item.file} holds something else than {name} of shape {self.sizes} at byte "
                f"{self.item.start}, so it belongs to another checkpoint or is damaged: take the "
                "file from a copy, or another iteration's folder."
            )
        if found.dtype != dtype:
            raise CheckpointError(
                f"{self.item.file} holds {name} in {found.dtype} where {METADATA} says {dtype}: "
                "take the checkpoint from a copy, or another iteration's folder."
            )
        return found


@dataclass(frozen=True, slots=True)
class DistributedTensor:
    """A tensor in chunks.

    Attributes:
        name: in the checkpoint.
        shape: of the whole tensor.
        dtype: of its elements.
        chunks: that lie in files.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def files(self) -> list[str]:
        """Names of the files that have a chunk."""
        return sorted({chunk.item.file.name for chunk in self.chunks})

    @property
    def stored_numel(self) -> int:
        """Elements in files; the padding between buckets is in none."""
        return sum(math.prod(chunk.sizes) for chunk in self.chunks)

    def wrong_files(self) -> list[str]:
        """Names of the files in which a chunk's bytes have another checksum than was written."""
        wrong = set()
        for chunk in self.chunks:
            with chunk.open() as archive:
                if archive.wrong_records():
                    wrong.add(chunk.item.file.name)
        return sorted(wrong)

    def boxes(self) -> Iterator[Box]:
        """Read it box by box.

        Raises:
            CheckpointError: a file is gone, truncated or holds something else.
        """
        for chunk in self.chunks:
            with chunk.open() as archive:
                stored = chunk.stored(archive, self.name, self.dtype)
                for first, values in stored.boxes():
                    offsets = chunk.offsets
                    if offsets:
                        offsets = (offsets[0] + first, *offsets[1:])
                    yield Box(chunk.item.file.name, offsets, values)

    def box(self, offsets: Shape, sizes: Shape) -> Tensor:
        """Read a box, from all chunks that have some of it.

        Raises:
            CheckpointError: as :meth:`boxes`, or no chunk has it.
        """
        result = torch.empty(sizes, dtype=self.dtype)
        missing = result.numel()
        for chunk in self.chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(first >= last for first, last in zip(low, high, strict=True)):
                continue
            with chunk.open() as archive:
                stored, origin = chunk.stored(archive, self.name, self.dtype), chunk.offsets
                if stored.shape and stored.is_contiguous:  # no more rows than are asked for
                    values = stored.rows(low[0] - origin[0], high[0] - low[0])
                    origin = (low[0], *origin[1:])
                else:
                    values = stored.read()
            target, source = (
                tuple(slice(a - o, b - o) for a, b, o in zip(low, high, first, strict=True))
                for first in (offsets, origin)
            )
            result[target] = values[source]
            missing -= values[source].numel()
        if missing > 0:
            raise CheckpointError(f"{self.name} lacks {missing} elements: no file has them.")
        return result


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where.

    Attributes:
        tensors: by name.
        objects: things other than tensors, by name.
    """

    tensors: dict[str, DistributedTensor]
    objects: dict[str, Item]


def read_layout(folder: Path) -> Layout:
    """Read ``.metadata``.

    Raises:
        CheckpointError: it is gone, truncated, or no metadata.
    """
    path = folder / METADATA
    with open_regular(path) as file:
        metadata = pickles.load(file.read(), str(path))
    try:
        return _layout(folder, metadata)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise cannot_be_read(path, f"{type(error).__name__}: {error}") from error


def _layout(folder: Path, metadata: Any) -> Layout:
    if not isinstance(metadata, Record) or not metadata.kind.endswith(".Metadata"):
        raise ValueError("it holds no Metadata")
    items: dict[tuple[str, Shape | None], Item] = {}
    for index, info in metadata.get("storage_data", {}).items():
        offset = index.get("offset")
        place = _numbers([info.get("offset"), info.get("length")])
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{folder / METADATA} says that files were transformed (compressed, say), which "
                "Megatron never does: save the checkpoint without that."
            )
        key = (str(index.get("fqn")), None if offset is None else _numbers(offset))
        items[key] = Item(_inside(folder, info.get("relative_path")), *place)
    tensors, objects = {}, {}
    for name, entry in metadata.get("state_dict_metadata", {}).items():
        if not isinstance(name, str):
            raise ValueError("a name in it is no string")
        if not entry.kind.endswith(".TensorStorageMetadata"):
            if (name, None) in items:
                objects[name] = items[name, None]
            continue
        dtype = entry.get("properties").get("state")[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype")
        shape = _numbers(entry.get("size"))
        chunks = tuple(
            _chunk(name, shape, _numbers(each.get("offsets")), _numbers(each.get("sizes")), items)
            for each in entry.get("chunks")
        )
        tensors[name] = DistributedTensor(name, shape, dtype, chunks)
    return Layout(tensors, objects)


def _chunk(
    name: str,
    shape: Shape,
    offsets: Shape,
    sizes: Shape,
    items: dict[tuple[str, Shape | None], Item],
) -> Chunk:
    bounds = zip(offsets, sizes, shape, strict=True)
    if not all(offset + size <= bound for offset, size, bound in bounds):
        raise ValueError(f"a chunk of {name} lies outside of it")
    if (name, offsets) not in items:
        raise ValueError(f"no file is named for a chunk of {name}")
    return Chunk(offsets, sizes, items[name, offsets])


def _numbers(values: Any) -> Shape:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"{numbers!r:.60} are no sizes")
    return numbers


def _inside(folder: Path, name: Any) -> Path:
    """The path of a file in the folder; none of another folder is opened."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"it names a file outside of the folder, {name!r:.60}")
    return folder / path
