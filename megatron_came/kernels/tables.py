"""What the kernels read: tables of addresses, shapes and ranges, one row for each piece of work.

The slice of a matrix parameter is cut into *tiles* of ``tile_rows`` x ``tile_columns`` elements. A
tile sums its rows and columns into a slot of a scratch buffer, and *strips* then add up, in a fixed
order, what the tiles beside or below one another hold. Tiles are taken in *segments*, so that the
scratch buffer has a fixed number of slots. Vectors need none of this: see ``VectorField``.

A *program* is a list of launches, each of one kernel over some rows of its table.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_came.layout import Shard

IntTable = npt.NDArray[np.int64]


class MatrixField(IntEnum):
    """Columns of the table of matrix parameters. Addresses point to fp32 unless said otherwise."""

    # What the host may change between steps.
    PARAM = 0  # address of the slice; bf16 where there are remainders
    GRAD = auto()  # fp32 or bf16
    EXP_AVG = auto()  # fp32, bf16 or int8
    EXP_AVG_SCALE = auto()  # of blocks of the slice, for int8; otherwise 0
    REMAINDER = auto()  # int16, the lower halves of fp32 weights, or 0
    MODEL_WEIGHT = auto()  # 16-bit copy of the slice, or 0
    ROW = auto()  # r, (batch, rows)
    COLUMN = auto()  # c, (batch, columns)
    RESIDUAL_ROW = auto()  # R
    RESIDUAL_COLUMN = auto()  # C
    GRAD_IS_BF16 = auto()
    MODEL_IS_BF16 = auto()  # otherwise fp16
    EXP_AVG_IS_BF16 = auto()
    KEY = auto()  # of this step's random bits
    # Geometry.
    START = auto()  # the slice is [START, STOP) of the flattened local tensor
    STOP = auto()
    BATCH = auto()
    ROWS = auto()
    COLUMNS = auto()
    FULL_ROWS = auto()  # all tensor-parallel ranks' together
    FULL_COLUMNS = auto()
    FULL_NUMEL = auto()
    ROWS_ARE_WHOLE = auto()  # this rank's row factor is that of the full matrix
    COLUMNS_ARE_WHOLE = auto()
    BATCH_OFFSET = auto()  # where the local tensor begins in the full one
    ROW_OFFSET = auto()
    COLUMN_OFFSET = auto()
    PART_ROWS = auto()  # see Shard.row_parts
    PART_JUMP = auto()
    GROUP = auto()  # row of the table of hyperparameters
    # Sums over elements, float64.
    SQUARE_ROWS = auto()  # of g^2, (batch, rows)
    SQUARE_COLUMNS = auto()
    TOTAL = auto()  # of u^2
    RESIDUAL_ROWS = auto()  # of e^2, u e and u^2, (3, batch, rows)
    RESIDUAL_COLUMNS = auto()
    # Results of the factors, in the scale buffer.
    ROW_SCALE = auto()  # (batch, rows)
    COLUMN_SCALE = auto()
    ROW_CONFIDENCE = auto()
    COLUMN_CONFIDENCE = auto()
    FIRST_MATRIX = auto()  # row of the first matrix in the table of clip divisors


class VectorField(IntEnum):
    """Columns of the table of vector parameters; as those of matrices unless said otherwise."""

    PARAM = 0
    GRAD = auto()
    EXP_AVG = auto()
    EXP_AVG_SCALE = auto()
    REMAINDER = auto()
    MODEL_WEIGHT = auto()
    MOMENT = auto()  # v, of the whole local vector
    GRAD_IS_BF16 = auto()
    MODEL_IS_BF16 = auto()
    EXP_AVG_IS_BF16 = auto()
    KEY = auto()
    START = auto()
    STOP = auto()
    SIZE = auto()  # of the local vector
    FULL_NUMEL = auto()
    OFFSET = auto()  # where the local vector begins in the full one
    PART_ROWS = auto()
    PART_JUMP = auto()
    GROUP = auto()
    SQUARES = auto()  # g^2 of the local vector, float64
    TOTAL = auto()  # sum of u^2, float64


class TileField(IntEnum):
    """Columns of the table of tiles."""

    PARAM = 0  # row of the table of matrix parameters
    MATRIX = 1  # of the parameter's batch
    ROW = 2  # first row
    STOP_ROW = 3
    COLUMN = 4  # first column


class SpanField(IntEnum):
    """Columns of the table of spans: whole blocks of int8 momentum, one after another."""

    PARAM = 0  # row of the table of matrix parameters
    FIRST = 1  # first element, in the slice
    STOP = 2


class StripField(IntEnum):
    """Columns of the table of strips: sums of tiles' sums, added to the buffers of sums."""

    SLOT = 0  # of the first tile in the scratch buffer
    STRIDE = 1  # slots to the next tile
    TILES = 2  # how many
    WITHIN = 3  # offset of the strip's first sum in a slot: 0 for rows, tile_rows for columns
    COUNT = 4  # sums
    SQUARES = 5  # address of the first sum, float64
    RESIDUALS = 6  # address of the first sum of e^2, float64
    RESIDUALS_STRIDE = 7  # elements from there to u e, and on to u^2


class GroupField(IntEnum):
    """Columns of the table of hyperparameters, float64, a row for each parameter group."""

    LR = 0
    WEIGHT_DECAY = 1
    BETA1 = 2
    BETA2 = 3
    BETA3 = 4
    EPS1 = 5
    EPS2 = 6
    CLIP_THRESHOLD = 7


_TABLES = (MatrixField, VectorField, TileField, SpanField, StripField, GroupField)
# Changes when a column moves: compiled kernels that were kept must not outlive their tables.
FINGERPRINT = zlib.crc32(repr([list(fields.__members__) for fields in _TABLES]).encode())


class Kernel(IntEnum):
    """The kernels, in the order of a step, and the rows of which table they take."""

    SQUARE_VECTORS = 0  # vectors: write g^2 to the buffer of sums
    SQUARE_TILES = auto()  # tiles: sum g^2 over rows and columns
    ADD_SQUARE_STRIPS = auto()  # strips: add the tiles' sums to the buffer of sums
    UPDATE_VECTORS = auto()  # vectors: v; sum u^2
    UPDATE_SECOND_MOMENTS = auto()  # factors: r and c; scales of u; guess of the clip divisor
    INSTABILITY_TILES = auto()  # tiles: sum e^2, u e and u^2 over rows and columns
    ADD_INSTABILITY_STRIPS = auto()  # strips: add the tiles' sums to the buffer of sums
    TOTAL_UPDATES = auto()  # matrices: sum u^2
    APPLY_VECTORS = auto()  # vectors: momentum and weights
    UPDATE_INSTABILITIES = auto()  # factors: clip divisor; R and C; scales of the confidence
    APPLY_TILES = auto()  # tiles: momentum and weights
    APPLY_SPANS = auto()  # spans: int8 momentum and weights


class LaunchField(IntEnum):
    """Columns of a program."""

    KERNEL = 0
    FIRST = 1  # row of its table; of tiles, the one that has the first slot
    STOP = 2
    BACKWARDS = 3  # whether the last rows are best taken first


Program = IntTable


class Segment(NamedTuple):
    """Tiles that share the scratch buffer, and the strips that empty it."""

    tiles: slice
    strips: slice


@dataclass(frozen=True, slots=True)
class Sums:
    """Where a parameter's sums over elements go; see ``ParameterWork.bind``."""

    squares: Sequence[Tensor]
    total: Tensor
    residuals: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a device's kernels cut matrices.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        slots: tiles whose sums the scratch buffer holds, at least.
        strip: sums of a strip of columns, at most.
        span: elements of a span.
    """

    rows: int
    columns: int
    slots: int
    strip: int = 256
    span: int = 2048


def vector_row(shard: Shard, sums: Sums, group: int) -> IntTable:
    """Describe a vector parameter."""
    row = np.zeros(len(VectorField), np.int64)
    row[VectorField.START], row[VectorField.STOP] = shard.start, shard.stop
    row[VectorField.SIZE] = shard.local_matrix[1]
    row[VectorField.FULL_NUMEL] = shard.full_numel
    row[VectorField.OFFSET] = shard.offsets[1]
    row[VectorField.PART_ROWS], row[VectorField.PART_JUMP] = shard.row_parts
    row[VectorField.GROUP] = group
    row[VectorField.SQUARES] = sums.squares[0].data_ptr()
    row[VectorField.TOTAL] = sums.total.data_ptr()
    return row


def matrix_row(
    shard: Shard, sums: Sums, group: int, scales: Sequence[Tensor], first_matrix: int
) -> IntTable:
    """Describe a matrix parameter.

    Args:
        shard: where the slice lies.
        sums: where its sums go.
        group: row of its group's hyperparameters.
        scales: row and column scale, row and column confidence.
        first_matrix: row of its first matrix in the table of clip divisors.
    """
    field = MatrixField
    row = np.zeros(len(field), np.int64)
    row[field.START], row[field.STOP] = shard.start, shard.stop
    row[field.BATCH], row[field.ROWS], row[field.COLUMNS] = shard.local_matrix
    row[field.FULL_ROWS], row[field.FULL_COLUMNS] = shard.full_rows, shard.full_columns
    row[field.FULL_NUMEL] = shard.full_numel
    row[field.ROWS_ARE_WHOLE] = shard.tp_axis != "rows"
    row[field.COLUMNS_ARE_WHOLE] = shard.tp_axis != "columns"
    row[field.BATCH_OFFSET : field.COLUMN_OFFSET + 1] = shard.offsets
    row[field.PART_ROWS], row[field.PART_JUMP] = shard.row_parts
    row[field.GROUP] = group
    row[field.SQUARE_ROWS : field.SQUARE_COLUMNS + 1] = [s.data_ptr() for s in sums.squares]
    row[field.TOTAL] = sums.total.data_ptr()
    row[field.RESIDUAL_ROWS : field.RESIDUAL_COLUMNS + 1] = [s.data_ptr() for s in sums.residuals]
    row[field.ROW_SCALE : field.COLUMN_CONFIDENCE + 1] = [s.data_ptr() for s in scales]
    row[field.FIRST_MATRIX] = first_matrix
    return row


def spans(shards: Sequence[Shard], elements: int) -> IntTable:
    """Cut the slices of matrix parameters into spans.

    Args:
        shards: in the order of their table.
        elements: of a span, whole blocks of int8 momentum.

    Returns:
        Table of ``SpanField``.
    """
    tables = [np.zeros((0, len(SpanField)), np.int64)]
    for param, shard in enumerate(shards):
        first = np.arange(0, shard.numel, elements, dtype=np.int64)
        stop = np.minimum(first + elements, shard.numel)
        tables.append(np.stack([np.full_like(first, param), first, stop], axis=1))
    return np.concatenate(tables)


class _Bands(NamedTuple):
    """Rows of tiles of one matrix that follow one another in a segment."""

    param: int
    matrix: int
    rows: range  # first rows of the bands
    stop_row: int


class Piece(NamedTuple):
    """Matrices that go through the passes together, and the rows of what they are cut into."""

    matrices: slice
    segments: tuple[Segment, ...]

    @property
    def tiles(self) -> slice:
        """Those of all segments."""
        if not self.segments:
            return slice(0, 0)
        return slice(self.segments[0].tiles.start, self.segments[-1].tiles.stop)


def cut(
    shards: Sequence[Shard], sums: Sequence[Sums], tiling: Tiling, limit: int | None = None
) -> tuple[IntTable, IntTable, tuple[Piece, ...], int]:
    """Cut the slices of matrix parameters.

    Args:
        shards: of the matrix parameters, in the order of their table.
        sums: likewise.
        tiling: sizes.
        limit: elements of a piece, if it has more than one matrix; None for a single piece.

    Returns:
        Table of tiles, table of strips, pieces, and slots that a segment needs at most.
    """
    tiles: list[IntTable] = []
    strips: list[list[int]] = []
    segments: list[Segment] = []
    pieces: list[Piece] = []
    tile_count = first_tile = first_strip = slots = 0

    def end_segment() -> None:
        nonlocal first_tile, first_strip, slots
        if tile_count > first_tile:
            segments.append(Segment(slice(first_tile, tile_count), slice(first_strip, len(strips))))
            slots = max(slots, tile_count - first_tile)
            first_tile, first_strip = tile_count, len(strips)

    for members in _together([shard.numel for shard in shards], limit):
        for param in members:
            shard = shards[param]
            across = -(-shard.local_matrix[2] // tiling.columns)
            for matrix, rows, stop_row in _touched(shard, tiling.rows):
                # A matrix begins a segment unless it ends there, so that its sums are added up in
                # the same order whatever comes before it.
                if tile_count - first_tile + len(rows) * across > tiling.slots:
                    end_segment()
                while rows:
                    bands = _Bands(param, matrix, rows[: max(tiling.slots // across, 1)], stop_row)
                    rows = rows[len(bands.rows) :]
                    slot = tile_count - first_tile
                    tiles.append(_tiles(bands, across, tiling))
                    strips += _strips(bands, across, tiling, slot, shard, sums[param])
                    tile_count += len(bands.rows) * across
                    if rows:
                        end_segment()
        end_segment()
        pieces.append(Piece(slice(members.start, members.stop), tuple(segments)))
        segments.clear()
    return (
        np.concatenate([np.zeros((0, len(TileField)), np.int64), *tiles]),
        np.array(strips, np.int64).reshape(-1, len(StripField)),
        tuple(pieces),
        slots,
    )


def _together(sizes: Sequence[int], limit: int | None) -> Iterator[range]:
    """Cut a list of sizes where their sum would pass the limit, if any."""
    first = total = 0
    for index, size in enumerate(sizes):
        if limit is not None and index > first and total + size > limit:
            yield range(first, index)
            first, total = index, 0
        total += size
    if sizes:
        yield range(first, len(sizes))


def _touched(shard: Shard, tile_rows: int) -> Iterator[tuple[int, range, int]]:
    """Yield what a slice touches: a matrix of the batch, first rows of its tiles, last row + 1."""
    _, rows, columns = shard.local_matrix
    if shard.start == shard.stop:
        return
    first, stop = shard.start // columns, -(-shard.stop // columns)
    for matrix in range(first // rows, -(-stop // rows)):
        low, high = max(first - matrix * rows, 0), min(stop - matrix * rows, rows)
        yield matrix, range(low, high, tile_rows), high


def _tiles(bands: _Bands, across: int, tiling: Tiling) -> IntTable:
    """Return the tiles of some bands, row by row."""
    row, column = np.meshgrid(
        np.array(bands.rows, np.int64),
        np.arange(across, dtype=np.int64) * tiling.columns,
        indexing="ij",
    )
    table = np.empty((row.size, len(TileField)), np.int64)
    table[:, TileField.PARAM], table[:, TileField.MATRIX] = bands.param, bands.matrix
    table[:, TileField.ROW], table[:, TileField.COLUMN] = row.ravel(), column.ravel()
    table[:, TileField.STOP_ROW] = np.minimum(row.ravel() + tiling.rows, bands.stop_row)
    return table


def _strips(
    bands: _Bands, across: int, tiling: Tiling, slot: int, shard: Shard, sums: Sums
) -> list[list[int]]:
    """Return the strips that add up the bands' tiles: rows side by side, columns downwards."""
    batch, rows, columns = shard.local_matrix
    (row_squares, column_squares), (row_residuals, column_residuals) = sums.squares, sums.residuals
    strips = []
    for index, row in enumerate(bands.rows):
        count = min(tiling.rows, bands.stop_row - row)
        place = (bands.matrix * rows + row) * 8
        addresses = [row_squares.data_ptr() + place, row_residuals.data_ptr() + place]
        strips.append([slot + index * across, 1, across, 0, count, *addresses, batch * rows])
    for column in range(0, columns, tiling.columns):
        top = slot + column // tiling.columns
        stop = min(column + tiling.columns, columns)
        for first in range(column, stop, tiling.strip):
            count, within = min(tiling.strip, stop - first), tiling.rows + first - column
            place = (bands.matrix * columns + first) * 8
            addresses = [column_squares.data_ptr() + place, column_residuals.data_ptr() + place]
            tiles = len(bands.rows)
            strips.append([top, across, tiles, within, count, *addresses, batch * columns])
    return strips
