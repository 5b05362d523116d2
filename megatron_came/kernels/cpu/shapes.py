"""A slice as the kernels see it: a batch of matrices, and tiles of their rows."""

import math
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from megatron_came.core.shard import Shard

# Rows that are taken together, so as to add to the sums of columns less often.
AT_ONCE = 4
# Rows of a tile, about, and tiles of a matrix, at least and at most. Columns of a tile are summed
# in fp32; the sums of all tiles by one thread, which many would keep too long.
_TILE_ROWS = 256
_MIN_TILES, _MAX_TILES = 4, 128
# fp32 elements of a page of memory. The quarters of a tile are read side by side: where each begins
# at another place of a page, that takes a quarter to a half longer. So many rows see to it at most.
_PAGE = 1024
_MAX_ALIGNED = 64


class Geometry(NamedTuple):
    """A slice of a batch of matrices.

    A vector is a batch of its parts (see ``Shard.tp_parts``), each a matrix of one row.
    """

    start: int  # first element of the slice, in the flattened local tensor
    size: int  # its elements
    batch: int  # matrices
    rows: int  # of a matrix
    columns: int  # likewise

    @classmethod
    def of(cls, shard: Shard) -> Self:
        """Return the geometry of a shard."""
        batch, rows, columns = shard.local_matrix
        if shard.is_vector:
            batch, rows, columns = shard.tp_parts, 1, rows // shard.tp_parts
        return cls(shard.start, shard.numel, batch, rows, columns)


def row_places(shard: Shard) -> npt.NDArray[np.int64]:
    """Return where in the full tensor each row begins: random bits belong to places there."""
    batch, rows, _ = shard.local_matrix
    at_batch, at_row, at_column = shard.offsets
    part_rows, part_jump = shard.row_parts
    row = np.arange(rows)
    full_row = at_row + row + row // part_rows * part_jump
    if shard.is_vector:
        return full_row[::part_rows]
    matrix = (at_batch + np.arange(batch)).reshape(-1, 1) * shard.full_rows
    return (matrix + full_row).reshape(-1) * shard.full_columns + at_column


def tiles_of(geometry: Geometry) -> npt.NDArray[np.int64]:
    """Cut the rows of a slice into tiles: (tiles, 3), of each its matrix, first and last row + 1.

    Rows are numbered through the batch. The cut depends on the slice alone, so that any number of
    threads adds up in the same order; a power of two is shared evenly by most numbers of them.
    """
    tiles: list[tuple[Any, ...]] = []
    rows, columns = geometry.rows, geometry.columns
    if geometry.size:
        unit = min(AT_ONCE * _PAGE // math.gcd(_PAGE, columns), _MAX_ALIGNED)
        first, stop = geometry.start // columns, -(-(geometry.start + geometry.size) // columns)
        for matrix in range(first // rows, -(-stop // rows)):
            low, high = max(first, matrix * rows), min(stop, (matrix + 1) * rows)
            wanted = 1 << ((high - low - 1) // _TILE_ROWS).bit_length()
            wanted = min(max(wanted, _MIN_TILES), _MAX_TILES)
            height = -(-(high - low) // (wanted * unit)) * unit
            tiles += [(matrix, row, min(row + height, high)) for row in range(low, high, height)]
    return np.array(tiles, np.int64).reshape(-1, 3)
