"""Checkpoints of ``--ckpt-format torch``: files of ``torch.save``, for each model-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_came.checkpoint_files.archives import Archive
from megatron_came.checkpoint_files.stored import Box
from megatron_came.checkpoint_files.tensors import StoredTensor

OPTIMIZER_FILE = "distrib_optim.pt"


@dataclass(frozen=True, slots=True)
class LegacyTensor:
    """A tensor of a file that is open.

    Attributes:
        name: the folder of its rank, and where it stands in the file's dictionaries.
        keys: the latter, one by one.
        path: of the file.
        stored: the tensor.
    """

    name: str
    keys: tuple[Any, ...]
    path: Path
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.stored.dtype

    @property
    def files(self) -> list[str]:
        """The file's name."""
        return [f"{self.path.parent.name}/{self.path.name}"]

    @property
    def stored_numel(self) -> int:
        """All elements."""
        return self.stored.numel

    def wrong_files(self) -> list[str]:
        """The file's name, if the tensor's bytes have another checksum than was written."""
        source, key = self.stored.storage.source, self.stored.storage.key
        return self.files if source.is_wrong(f"data/{key}") else []

    def boxes(self) -> Iterator[Box]:
        """Read it a few rows at a time."""
        for first, values in self.stored.boxes():
            offsets = (first, *(0 for _ in self.shape[1:])) if self.shape else ()
            yield Box(self.files[0], offsets, values)


def tensors_of(path: Path, state: Any) -> Iterator[LegacyTensor]:
    """List the tensors in what :meth:`Archive.load` made of a file, each container once.

    Args:
        path: of the file.
        state: what it holds.
    """
    root = "optimizer" if path.name == OPTIMIZER_FILE else ""
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any]] = [((root,) if root else (), state)]
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, StoredTensor):
            name = ".".join([path.parent.name, *map(str, keys)])
            yield LegacyTensor(name, keys, path, value)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            waiting += [((*keys, key), inner) for key, inner in reversed(items)]


def open_file(path: Path) -> tuple[Archive, Any]:
    """Open a file and read all of it but the tensors.

    Raises:
        CheckpointError: it cannot be read.
    """
    archive = Archive(path)
    try:
        return archive, archive.load()
    except BaseException:
        archive.close()
        raise
