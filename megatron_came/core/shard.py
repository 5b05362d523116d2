"""Which flat range of which matrix a rank holds: frozen geometry, computed once.

Every tensor is seen as a batch of matrices, ``(batch, rows, columns)``: the last two dimensions are
rows and columns, the leading ones the batch; a vector of n elements is one (n, 1) matrix.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

Axis = Literal["batch", "rows", "columns"]


class ProcessGroup(Protocol):
    """What the geometry asks of a ``torch.distributed.ProcessGroup``: its number of ranks."""

    def size(self) -> int:
        """Return the number of ranks."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a parameter that this rank updates, and the ranks that hold the rest.

    Two kinds of sharding meet. Tensor parallelism cuts the full tensor along one dimension into
    equal *local* tensors, one a rank. A ZeRO-1 distributed optimizer cuts the local tensor,
    flattened in row-major order, into ranges that may begin and end in the middle of a row; a
    range may be empty.

    Args:
        shape: shape of the whole local tensor, before the optimizer cut it.
        start: first flat element of the local tensor that this rank holds.
        stop: one past its last element; ``start == stop`` is an empty slice.
        tp_dim: dimension of ``shape`` along which tensor parallelism cut the full tensor
            (Megatron's ``partition_dim``); None where every rank of ``tp_group`` holds all of it.
        tp_group: ranks that hold the other tensor-parallel shards; None for a single rank.
        tp_rank: which of the shards this is.
        tp_parts: number of equal parts that the rows (of a vector, the elements) of the full
            tensor consist of, each of which tensor parallelism cuts by itself (Megatron's
            ``partition_stride``): 2 for SwiGLU, whose two projections are stacked.
        dp_group: ranks that hold the other flat ranges of this local tensor; None where this
            rank holds the whole local tensor (also with plain data parallelism, whose gradients
            are already summed).
        more_groups: groups to sum over next, where the local tensor is cut by several.
        window: ranges of ``local_matrix``, (batch, rows, columns), in which ``start`` and ``stop``
            count; None for all of it. Of cuts that leave no flat range.
        tp_dp_group: the ranks of ``tp_group`` times ``dp_group`` as one group, where there is one:
            a sum over both then takes one collective and fewer bytes.
        copies_group: ranks that hold a copy of this very slice, with the same gradient, and must
            stay bit-identical (tied embeddings on the first and last pipeline stage); None for
            no copies.
        factored: whether a tensor of two or more dimensions has the statistics of a matrix; if not
            it is updated as a vector of its elements.

    Raises:
        ValueError: a range outside the tensor, a ``tp_dim`` that the tensor does not have, parts
            that are not of equal size, or a window of an unfactored tensor.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    tp_dim: int | None = None
    tp_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    tp_dp_group: ProcessGroup | None = None
    copies_group: ProcessGroup | None = None
    tp_rank: int = 0
    tp_parts: int = 1
    more_groups: tuple[ProcessGroup, ...] = ()
    window: tuple[slice, slice, slice] | None = None
    factored: bool = True

    def __post_init__(self) -> None:
        numel = math.prod(_sizes(self.window)) if self.window else math.prod(self.shape)
        if not 0 <= self.start <= self.stop <= numel:
            raise ValueError(
                f"Shard: the range [{self.start}, {self.stop}) does not lie within the {numel} "
                f"elements of shape {self.shape}."
            )
        if self.tp_dim is not None and not 0 <= self.tp_dim < len(self.shape):
            raise ValueError(
                f"Shard: tp_dim {self.tp_dim} is not a dimension of shape {self.shape}; "
                "give None for a tensor that tensor parallelism does not cut."
            )
        if self.window and len(self.shape) > 1 and not self.factored:
            raise ValueError(
                f"Shard: a window of shape {self.shape} needs rows and columns: leave factored out."
            )
        if self.tp_parts > 1 and (
            self.tp_axis not in ("rows", None) or self.local_matrix[1] % self.tp_parts
        ):
            raise ValueError(
                f"Shard: the {self.local_matrix[1]} rows of shape {self.shape}, cut along "
                f"dimension {self.tp_dim}, do not consist of {self.tp_parts} equal parts."
            )

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Self:
        """Return the shard of a rank that holds the full tensor alone."""
        return cls(shape=shape, start=0, stop=math.prod(shape))

    @property
    def numel(self) -> int:
        """Number of elements that this rank holds."""
        return self.stop - self.start

    @property
    def is_vector(self) -> bool:
        """Whether it has a whole second moment, and no confidence."""
        return len(self.shape) < 2 or not self.factored

    @property
    def has_copies(self) -> bool:
        """Whether another rank holds a copy of this slice."""
        return self.copies_group is not None and self.copies_group.size() > 1

    @property
    def replicas(self) -> int:
        """How many ranks of its groups hold this very slice, each whole."""
        of_tp = self.tp_group if self.tp_dim is None else None
        return math.prod(group.size() for group in (of_tp, self.copies_group) if group is not None)

    @property
    def share(self) -> float:
        """What of the full tensor counts here, so that all ranks' shares add up to one."""
        return self.numel / self.full_numel / self.replicas

    @property
    def local_matrix(self) -> tuple[int, int, int]:
        """The whole local tensor as (batch, rows, columns)."""
        if self.is_vector:
            return 1, math.prod(self.shape), 1
        return math.prod(self.shape[:-2]), self.shape[-2], self.shape[-1]

    @property
    def tp_size(self) -> int:
        """Into how many local tensors the full tensor is cut."""
        return 1 if self.tp_dim is None or self.tp_group is None else self.tp_group.size()

    @property
    def tp_axis(self) -> Axis | None:
        """The axis of ``local_matrix`` that tensor parallelism cuts; None where it cuts nothing."""
        if self.tp_size == 1 or self.tp_dim is None:
            return None
        if self.is_vector:
            return "rows"
        axes: dict[int, Axis] = {len(self.shape) - 2: "rows", len(self.shape) - 1: "columns"}
        return axes.get(self.tp_dim, "batch")

    @property
    def offsets(self) -> tuple[int, int, int]:
        """Where the local tensor begins in the full one, as (batch, row, column)."""
        batch, rows, columns = self.local_matrix
        sizes = {"batch": batch, "rows": rows // self.tp_parts, "columns": columns}
        batch, row, column = (
            self.tp_rank * size * (axis == self.tp_axis) for axis, size in sizes.items()
        )
        return batch, row, column

    @property
    def row_parts(self) -> tuple[int, int]:
        """Local rows of a part, and rows of the full matrix between the local ones of two parts."""
        rows = self.local_matrix[1] // self.tp_parts
        return max(rows, 1), self.full_rows // self.tp_parts - rows

    @property
    def full_rows(self) -> int:
        """Rows of one full matrix: the divisor of column means."""
        return self.local_matrix[1] * (self.tp_size if self.tp_axis == "rows" else 1)

    @property
    def full_columns(self) -> int:
        """Columns of one full matrix: the divisor of row means."""
        return self.local_matrix[2] * (self.tp_size if self.tp_axis == "columns" else 1)

    def full_offsets(self, box: "Box", device: torch.device) -> Tensor:
        """Return the offset in the flattened full tensor of each element of a box, int64."""
        batch, rows, columns = (
            torch.arange(axis.start, axis.stop, device=device) + offset
            for axis, offset in zip((box.batch, box.rows, box.columns), self.offsets, strict=True)
        )
        size, jump = self.row_parts
        rows = rows + torch.arange(box.rows.start, box.rows.stop, device=device) // size * jump
        row = batch.view(-1, 1, 1) * self.full_rows + rows.view(-1, 1)
        return row * self.full_columns + columns

    @property
    def full_numel(self) -> int:
        """Elements of the full tensor: the divisor of the clipping RMS."""
        return math.prod(self.shape) * self.tp_size


class Box(NamedTuple):
    """A box of a slice: its flat elements [start, stop), seen as (batch, rows, columns)."""

    start: int
    stop: int
    batch: slice
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along batch, rows and columns."""
        return _sizes((self.batch, self.rows, self.columns))

    @property
    def flat(self) -> slice:
        """Index of its elements in the flat slice."""
        return slice(self.start, self.stop)


def boxes(shard: Shard, limit: int) -> Iterator[Box]:
    """Cut the slice of a shard into boxes, in order, each of at most ``limit`` elements.

    A slice is a partial row, rows up to the end of a matrix, whole matrices, rows, and a partial
    row; each of these is a box, cut further where it is larger than the limit (a single whole
    row is not).
    """
    window = shard.window or tuple(slice(0, size) for size in shard.local_matrix)
    first_matrix, first_row, first_column = (each.start for each in window)
    _, rows, columns = _sizes(window)
    position = shard.start
    while position < shard.stop:
        left = shard.stop - position
        global_row, column = divmod(position, columns)
        matrix, row = divmod(global_row, rows)
        box = (1, 1, min(columns - column, left, limit))
        if column == 0 and left >= columns:
            whole_rows = left // columns
            if row == 0 and whole_rows >= rows and rows * columns <= limit:
                box = (min(whole_rows // rows, limit // (rows * columns)), rows, columns)
            else:
                box = (1, min(rows - row, whole_rows, max(1, limit // columns)), columns)
        size = math.prod(box)
        offset = position - shard.start
        yield Box(
            start=offset,
            stop=offset + size,
            batch=_range(first_matrix + matrix, box[0]),
            rows=_range(first_row + row, box[1]),
            columns=_range(first_column + column, box[2]),
        )
        position += size


def _range(start: int, length: int) -> slice:
    return slice(start, start + length)


def _sizes(window: Sequence[slice]) -> tuple[int, ...]:
    return tuple(each.stop - each.start for each in window)
