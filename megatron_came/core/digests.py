"""Digests of a checkpoint's tensors that do not depend on who holds which part of them.

A tensor is seen as a matrix: its columns are the last dimension, its rows all others, flattened; a
vector is one row. Its digest is a sum over its elements, modulo 2^64:

    sum of row_key(row) * column_key(column) * bits(element)

with odd keys that are hashes of the indices in the *whole* tensor. A sum may be added up in any
order and from any parts, so each rank adds what it holds, and a reader of the files does the same.
One changed bit of one element always changes the digest, since the keys are odd; any other change
does but for a chance of about 2^-30. Bits are those of the stored number, as a signed integer,
so -0 is not 0 and a NaN is a number like any other.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron_came.core.rounding import mix

WEIGHTS, MAIN_WEIGHTS, MOMENTUM = "weights", "main weights", "momentum"

Shape = tuple[int, ...]

_MASK64 = (1 << 64) - 1
# Elements that are taken at once: on a CPU their products, in 64 bits, stay in the cache;
# a GPU would wait for so many small launches.
_AT_ONCE, _AT_ONCE_OF_GPU = 1 << 16, 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits of infinity, from which on a number without its sign is none.
INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0 << 48,
}


def row_keys(rows: Tensor) -> Tensor:
    """Return an odd 64-bit number for each row (SplitMix64's finalizer)."""
    value = rows * signed(0x9E3779B97F4A7C15) + signed(0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ _shifted(value, shift)) * signed(factor)
    return (value ^ _shifted(value, 31)) | 1


def column_keys(columns: Tensor) -> Tensor:
    """Return an odd 32-bit number for each column (MurmurHash3's finalizer), as int32."""
    return (mix(columns * 0x9E3779B1 + 0x7F4A7C15) | 1).to(torch.int32)


@cache
def _table(keys: Callable[[Tensor], Tensor], log2: int, device: torch.device) -> Tensor:
    return keys(torch.arange(1 << log2, device=device))


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """A box of a local tensor, and where it stands in the whole tensor."""

    place: Shape  # where it begins in the local tensor, along each dimension
    size: Shape  # of the box, along each dimension
    offset: Shape  # where it begins in the whole tensor
    shape: Shape  # of the whole tensor

    @classmethod
    def whole(cls, shape: Shape) -> Self:
        """Return the box of a reader who has all of a tensor."""
        return cls.alone(shape, (0,) * len(shape), shape)

    @classmethod
    def alone(cls, size: Shape, offset: Shape, shape: Shape) -> Self:
        """Return the box that is all of a local tensor."""
        return cls((0,) * len(size), size, offset, shape)


class Matrix(NamedTuple):
    """A rectangle of a flat slice that is one of the whole tensor, too."""

    position: int  # of its first element in the slice
    rows: int
    columns: int
    stride: int  # elements from one row to the next
    row: int  # of the whole tensor, that it begins in
    column: int  # likewise

    def keys(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the keys of its rows and columns, views of tables that are kept."""
        row, column = self.row + self.rows, self.column + self.columns
        rows = _table(row_keys, (row - 1).bit_length(), device)
        columns = _table(column_keys, (column - 1).bit_length(), device)
        return rows[self.row : row], columns[self.column : column]


class Term(NamedTuple):
    """What is added to a digest: a matrix of a flat tensor of integers, times 2^shift."""

    bits: Tensor
    matrix: Matrix
    shift: int
    dtype: torch.dtype  # of the numbers whose bits these are


class Added(NamedTuple):
    """What an adder finds of a term: the sum, modulo 2^64; whether no number is NaN or infinite."""

    total: int
    is_finite: bool


Adder = Callable[[Sequence[Term]], list[Added]]


def add_up(terms: Sequence[Term]) -> list[Added]:
    """Return what terms that are on one device add up to, in plain PyTorch."""
    if not terms:
        return []
    found = torch.stack([_sum(*term) for term in terms]).tolist()
    return [
        Added(total, largest < INFINITY.get(term.dtype, 1 << 63))
        for (total, largest), term in zip(found, terms, strict=True)
    ]


def _sum(bits: Tensor, matrix: Matrix, shift: int, _: torch.dtype) -> Tensor:
    rows, columns = matrix.keys(bits.device)
    begin = bits.storage_offset() + matrix.position
    bits = bits.as_strided((matrix.rows, matrix.columns), (matrix.stride, 1), begin)
    total, largest = rows.new_zeros(2).unbind()
    limit = _AT_ONCE if bits.device.type == "cpu" else _AT_ONCE_OF_GPU
    without_sign = (1 << 8 * bits.element_size() - 1) - 1
    for left in range(0, matrix.columns, limit):
        keys = columns[left : left + limit].to(torch.int64)
        step = max(1, limit // keys.numel())
        for top in range(0, matrix.rows, step):
            some = bits[top : top + step, left : left + limit]
            largest = torch.maximum(largest, (some & without_sign).amax().long())
            some = some.to(torch.int64, copy=True)
            total += (some.mul_(keys).sum(1) * rows[top : top + step]).sum()
    return torch.stack([total << shift, largest])


def terms(
    values: Tensor, local: Shape, box: PlacedBox, *, start: int = 0, as_fp32: bool = False
) -> list[Term]:
    """Return what a slice of a local tensor adds to the digest of a whole tensor.

    Args:
        values: the slice.
        local: shape of the local tensor.
        box: of it, which belongs to the whole tensor.
        start: first flat element of the local tensor that the slice holds.
        as_fp32: count the bits that the values, fp32 or bf16, have as fp32 numbers.

    Raises:
        TypeError: such values are of another dtype.
    """
    if as_fp32 and values.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"digests of optimizer state are of fp32 or bf16, not {values.dtype}")
    # bf16 is the upper half of fp32.
    shift = 16 if as_fp32 and values.dtype == torch.bfloat16 else 0
    bits = values.detach().reshape(-1)
    bits = bits.view(_INTEGERS[bits.element_size()])
    matrices = _matrices(start, bits.numel(), local, box)
    return [Term(bits, matrix, shift, values.dtype) for matrix in matrices]


def digest(added: Sequence[Term], add: Adder = add_up) -> int:
    """Return the sum of :func:`terms`, in [0, 2^64)."""
    return unsigned(sum(each.total for each in add(added)))


def digest_whole(values: Tensor, *, as_fp32: bool = False, add: Adder = add_up) -> int:
    """Return the digest of a whole tensor, in [0, 2^64)."""
    shape = tuple(values.shape)
    return digest(terms(values, shape, PlacedBox.whole(shape), as_fp32=as_fp32), add)


@lru_cache(1 << 16)  # training sums up the same slices at every save
def _matrices(start: int, numel: int, local: Shape, box: PlacedBox) -> tuple[Matrix, ...]:
    """Cut what a slice holds of a box into matrices."""
    if not local:
        local, box = (1,), PlacedBox.whole((1,))
    width, shift = local[-1], box.offset[-1] - box.place[-1]
    found = []
    for top, rows, row in _rows(local, box):
        low, high = max(start, top * width), min(start + numel, (top + rows) * width)
        for first, last, left, right in _rectangles(low, high, width):
            begin, end = max(left, box.place[-1]), min(right, box.place[-1] + box.size[-1])
            if begin < end:
                position, at = first * width + begin - start, row + first - top
                size = (last - first, end - begin)
                found.append(Matrix(position, *size, width, at, begin + shift))
    return tuple(found)


def _rows(local: Shape, box: PlacedBox) -> Iterator[tuple[int, int, int]]:
    """Rows of a box that follow each other: the first here, how many, the first in the whole."""
    inner, rows = len(local) - 1, 1
    while inner:  # dimensions that are whole are one with the dimension before
        inner -= 1
        rows *= box.size[inner]
        if not box.size[inner] == local[inner] == box.shape[inner]:
            break
    for index in product(*map(range, box.size[:inner])):
        at = (*index, *(0,) * (len(local) - 1 - inner))
        first = row = 0
        for dim, i in enumerate(at):
            first = first * local[dim] + box.place[dim] + i
            row = row * box.shape[dim] + box.offset[dim] + i
        yield first, rows, row


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a flat range into (first row, last row, first column, last column), ends exclusive."""
    while start < stop:
        row, column = divmod(start, columns)
        rows = 0 if column else (stop - start) // columns
        size = rows * columns or min(columns - column, stop - start)
        yield row, row + max(rows, 1), column, columns if rows else column + size
        start += size


def unsigned(total: int) -> int:
    """Return a sum of digests modulo 2^64."""
    return total & _MASK64


def name_of(key: str, axes: tuple[int, ...]) -> str:
    """Return the name of a tensor: its key and its indices along the axes before it."""
    return key + "".join(f"[{index}]" for index in axes)


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the key and the indices that :func:`name_of` was given."""
    key, axes = re.fullmatch(r"(.*?)((?:\[\d{1,18}\])*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    return key, tuple(int(index) for index in re.findall(r"\d+", axes))


def signed(value: int) -> int:
    """Return the int64 with these 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(value: Tensor, by: int) -> Tensor:
    """Shift to the right as if unsigned."""
    return (value >> by) & ((1 << (64 - by)) - 1)
