"""What tensors of all formats have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that has been read.

    Attributes:
        file: name of the file that it comes from.
        offsets: of its first element in the tensor.
        values: its elements, in its shape.
    """

    file: str
    offsets: tuple[int, ...]
    values: Tensor


class Stored(Protocol):
    """A tensor in files."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def files(self) -> list[str]:
        """Names of the files that hold it."""

    @property
    def stored_numel(self) -> int:
        """Elements in these files."""

    def wrong_files(self) -> list[str]:
        """Names of the files whose own checksum of it is wrong.

        Raises:
            CheckpointError: it cannot be read.
        """

    def boxes(self) -> Iterator[Box]:
        """Read it, part by part.

        Raises:
            CheckpointError: it cannot be read.
        """
