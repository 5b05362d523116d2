"""A checkpoint's tensors, of either format: what they are, and where they lie."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_came.checkpoint_files.archives import PICKLE, Archive
from megatron_came.checkpoint_files.errors import REMEDY, CheckpointError
from megatron_came.checkpoint_files.tensors import StoredTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """Where something lies: an archive in a file; without a length it ends with that."""

    file: Path
    start: int = 0
    length: int | None = None

    @property
    def name(self) -> str:
        """The file's name within the checkpoint."""
        folder = self.file.parent.name
        return f"{folder}/{self.file.name}" if folder.startswith("mp_rank_") else self.file.name

    def open(self) -> Archive:
        """Open the archive."""
        return Archive(self.file, self.start, self.length)

    def load(self) -> Any:
        """Read an object that is no tensor."""
        with self.open() as archive:
            return archive.load()

    def is_wrong(self, *, whole: bool = False) -> bool:
        """Whether its pickle, or all of it, has another checksum than was written with it."""
        with self.open() as archive:
            return any(map(archive.is_wrong, archive.members if whole else (PICKLE,)))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, in an archive."""

    offsets: Shape  # of its first element in the tensor
    sizes: Shape
    item: Item
    # The archive and what is in it, where the archive stays open (``torch``).
    opened: tuple[Archive, StoredTensor] | None = None


class ReadBox(NamedTuple):
    """A box of a tensor that has been read."""

    offsets: Shape
    values: Tensor


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor in files."""

    name: str
    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    kind: str | None  # as digests have it; None for anything but weights and CAME's state
    key: str  # of its parameter in the model's state, or of its bucket; none of a flat buffer
    # Whether it is one of the distributed optimizer, whose padding is arbitrary.
    is_bucket: bool = False

    @property
    def dtype_name(self) -> str:
        """Of its elements, without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def files(self) -> list[str]:
        """Names of the files that have a chunk."""
        return sorted({chunk.item.name for chunk in self.chunks})

    @property
    def stored_numel(self) -> int:
        """Elements in files; the padding between buckets is in none."""
        return sum(math.prod(chunk.sizes) for chunk in self.chunks)

    @property
    def stored_bytes(self) -> int:
        """Bytes in files."""
        return self.stored_numel * self.dtype.itemsize

    @contextlib.contextmanager
    def opened(self, chunk: Chunk) -> Iterator[tuple[Archive, StoredTensor]]:
        """Open one of its chunks.

        Raises:
            CheckpointError: it is not what the metadata says.
        """
        if chunk.opened is not None:
            yield chunk.opened
            return
        with chunk.item.open() as archive:
            found = archive.load()
            if not isinstance(found, StoredTensor) or found.shape != chunk.sizes:
                raise CheckpointError(
                    f"{chunk.item.file} holds something else than {self.name} of shape "
                    f"{chunk.sizes} at byte {chunk.item.start}, so it belongs to another "
                    f"checkpoint or is damaged: {REMEDY}"
                )
            if found.dtype != self.dtype:
                raise CheckpointError(
                    f"{chunk.item.file} holds {self.name} in {found.dtype} where .metadata says "
                    f"{self.dtype}: {REMEDY}"
                )
            yield archive, found

    def wrong_files(self) -> list[str]:
        """Names of the files in which its bytes have another checksum than was written."""
        wrong = set()
        for chunk in self.chunks:
            with self.opened(chunk) as (archive, stored):
                # An archive that stays open has all tensors of a rank.
                own = [stored.storage.member]
                if any(map(archive.is_wrong, own if chunk.opened else archive.members)):
                    wrong.add(chunk.item.name)
        return sorted(wrong)

    def boxes(self, *chunks: Chunk) -> Iterator[ReadBox]:
        """Read it box by box: all of it, or some of its chunks.

        Raises:
            CheckpointError: a file is gone, truncated or holds something else.
        """
        for chunk in chunks or self.chunks:
            with self.opened(chunk) as (_, stored):
                for first, values in stored.boxes():
                    offsets = chunk.offsets
                    if offsets:  # a scalar has none
                        offsets = (offsets[0] + first, *offsets[1:])
                    yield ReadBox(offsets, values)

    def box(self, offsets: Shape, sizes: Shape) -> Tensor:
        """Read a box, from all chunks that have some of it.

        Raises:
            CheckpointError: as :meth:`boxes`, or no chunk has it.
        """
        result = torch.empty(sizes, dtype=self.dtype)
        missing = result.numel()
        for chunk in self.chunks:
            bounds = zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            common = [range(max(a, b), min(a + n, b + m)) for a, n, b, m in bounds]
            if not all(common):
                continue
            with self.opened(chunk) as (_, stored):
                origin = chunk.offsets
                if stored.shape and stored.is_contiguous:  # no more rows than are asked for
                    values = stored.rows(common[0].start - origin[0], len(common[0]))
                    origin = (common[0].start, *origin[1:])
                else:
                    values = stored.read()
            target, source = (
                tuple(slice(x.start - o, x.stop - o) for x, o in zip(common, first, strict=True))
                for first in (offsets, origin)
            )
            result[target] = values[source]
            missing -= values[source].numel()
        if missing > 0:
            raise CheckpointError(f"{self.name} lacks {missing} elements: no file has them.")
        return result
