"""Tensors that are still in an archive."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_came.checkpoint_files.errors import CheckpointError

# Of what is read at once where a tensor need not be whole.
READ_BYTES = 64 << 20
MOST_DIMENSIONS = 64  # of PyTorch's tensors


def is_size(number: object) -> bool:
    """Whether it is a size or an offset that PyTorch's 64 bits hold, sums of two included."""
    return type(number) is int and 0 <= number < 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Elements one after the other, in a member of an archive, which is in a file."""

    file: str
    member: str
    # Reads so many of its bytes, from one on; raises a CheckpointError if they are not there.
    read: Callable[[int, int], bytearray]
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A view of a storage, whose start and strides are in elements.

    Raises:
        ValueError: it is not within its storage.
    """

    storage: Storage
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.start, *self.shape, *self.strides)
        if not isinstance(self.storage, Storage) or not isinstance(self.dtype, torch.dtype):
            raise ValueError("a tensor in it has no storage")
        if len(self.shape) != len(self.strides) or len(self.shape) > MOST_DIMENSIONS:
            raise ValueError("a tensor in it has another number of strides than of dimensions")
        if not all(map(is_size, numbers)):
            raise ValueError("a tensor in it has a shape or strides that are no numbers")
        size = self.dtype.itemsize
        available = self.storage.numel * self.storage.dtype.itemsize
        if self.numel and (self.start + self._extent) * size > available:
            raise ValueError(f"a tensor of shape {self.shape} in it goes beyond its storage")
        if self.numel * size > available:  # a stride of 0 would make many elements of few
            raise ValueError(f"a tensor of shape {self.shape} in it has more elements than stored")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def _extent(self) -> int:
        """Elements of the storage from the first to the last of the tensor."""
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other in the order of the indices."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    def read(self) -> Tensor:
        """Read all of it.

        Raises:
            CheckpointError: the file has less.
        """
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        return self._elements(self.start, self._extent).as_strided(self.shape, self.strides)

    def rows(self, first: int, count: int) -> Tensor:
        """Read some of what the first dimension counts, of a tensor that is contiguous."""
        row = math.prod(self.shape[1:])
        return self._elements(self.start + first * row, count * row).view(count, *self.shape[1:])

    def boxes(self) -> Iterator[tuple[int, Tensor]]:
        """Read it a few rows at a time, if they lie in order; else at once.

        Yields:
            The index of the first row in the tensor, and the rows.
        """
        if not self.is_contiguous or not self.numel or not self.shape:
            yield 0, self.read()
            return
        step = max(READ_BYTES // (math.prod(self.shape[1:]) * self.dtype.itemsize), 1)
        for first in range(0, self.shape[0], step):
            yield first, self.rows(first, min(step, self.shape[0] - first))

    def _elements(self, start: int, count: int) -> Tensor:
        size = self.dtype.itemsize
        if not count:  # of which PyTorch makes no tensor
            return torch.empty(0, dtype=self.dtype)
        data = self.storage.read(start * size, count * size)
        try:
            return torch.frombuffer(data, dtype=self.dtype)
        except (TypeError, ValueError, RuntimeError) as error:  # dtypes that it does not take
            raise CheckpointError(
                f"{self.storage.file} has a tensor of {self.dtype}, which cannot be read "
                "here and which CAME does not write: take the file from a copy."
            ) from error
