"""How the slices of matrix parameters are cut into what the kernels take.

The slice of a matrix parameter is cut into *tiles*, as a :class:`Tiling` says. A tile sums its rows
and columns into a slot of a scratch buffer, and *strips* then add up, in a fixed order, what the
tiles beside or below one another hold. Tiles are taken in *segments*, so that the scratch buffer
has a fixed number of slots; where launches cost time, tiles of large models are higher instead, so
that there are few segments. *Blocks* are matrices that go through passes by themselves: where no
sum goes over ranks, *cache blocks* that together fit the cache go through all passes before the
next ones. *Spans* are whole blocks of int8 momentum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megatron_came.core.parameter_slice import SliceSums
from megatron_came.core.shard import Shard
from megatron_came.kernels.triton.tables import IntTable, SpanField, StripField, TileField

# Places in a tile fit 32 bits.
PLACES = 2**30
# A stretched tile has no more elements than one of so many columns that is not.
_STRETCH_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a device's kernels cut matrices.

    Attributes:
        rows: of a tile that is not stretched.
        columns: of a tile, at most.
        slots: tiles whose sums the scratch buffer holds, at least.
        strip: sums of a strip, at most.
        span: elements of a span.
        stretch: narrow tiles have up to so many times the rows.
        tallest: rows to which tiles may grow where there are more than slots.
    """

    rows: int
    columns: int
    slots: int
    strip: int = 256
    span: int = 2048
    stretch: int = 1
    tallest: int = 0

    @property
    def slot_rows(self) -> int:
        """Rows of the tallest tile."""
        return self.rows * self.stretch

    @property
    def slot_sums(self) -> int:
        """Sums of a tile's rows and columns that a slot has room for."""
        return self.slot_rows + self.columns

    def rows_of(self, columns: int) -> int:
        """Rows of the tiles of a matrix: more where they are narrow, so that there are fewer."""
        return self.rows * min(max(_STRETCH_COLUMNS // max(columns, 1), 1), self.stretch)


def grown(tiling: Tiling, shards: Sequence[Shard]) -> Tiling:
    """Make tiles higher until all of them share the scratch buffer, if they may be so high.

    The order of a matrix's sums then depends on how many others there are; ranks that hold the same
    matrix, and must agree in the last bit, hold the same others, or agree on the sums themselves.

    Args:
        tiling: sizes.
        shards: of the matrix parameters.
    """
    widest = max((shard.local_matrix[2] for shard in shards), default=0)
    tallest = min(tiling.tallest, PLACES // max(widest, 1))
    while 2 * tiling.rows <= tallest and _count_tiles(tiling, shards) > tiling.slots:
        tiling = replace(tiling, rows=2 * tiling.rows)
    return tiling


def _count_tiles(tiling: Tiling, shards: Sequence[Shard]) -> int:
    count = 0
    for shard in shards:
        columns = shard.local_matrix[2]
        bands = _touched(shard, tiling.rows_of(columns))
        count += _across(tiling, columns) * sum(len(rows) for _, rows, _ in bands)
    return count


def _across(tiling: Tiling, columns: int) -> int:
    """Tiles that lie side by side."""
    return -(-columns // tiling.columns)


class Segment(NamedTuple):
    """Tiles that share the scratch buffer, and the strips that empty it."""

    tiles: slice
    strips: slice


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


class Block(NamedTuple):
    """Matrices that go through the passes together, and the rows of what they are cut into."""

    matrices: slice
    segments: tuple[Segment, ...]


def cache_blocks(sizes: Sequence[int], limit: int | None) -> Iterator[range]:
    """Put matrices together that fit the cache.

    Args:
        sizes: elements of each.
        limit: of a block that has more than one matrix; None for a single block.
    """
    first = total = 0
    for index, size in enumerate(sizes):
        if limit is not None and index > first and total + size > limit:
            yield range(first, index)
            first, total = index, 0
        total += size
    if sizes:
        yield range(first, len(sizes))


def cut(
    shards: Sequence[Shard], sums: Sequence[SliceSums], tiling: Tiling, together: Sequence[range]
) -> tuple[IntTable, IntTable, tuple[Block, ...], int]:
    """Cut the slices of matrix parameters.

    Args:
        shards: of the matrix parameters, in the order of their table.
        sums: likewise.
        tiling: sizes.
        together: the matrices of each block.

    Returns:
        Table of tiles, table of strips, blocks, and slots that a segment needs at most.
    """
    tiles: list[IntTable] = []
    strips: list[list[int]] = []
    segments: list[Segment] = []
    blocks: list[Block] = []
    tile_count = first_tile = first_strip = slots = 0

    def end_segment() -> None:
        nonlocal first_tile, first_strip, slots
        if tile_count > first_tile:
            segments.append(Segment(slice(first_tile, tile_count), slice(first_strip, len(strips))))
            slots = max(slots, tile_count - first_tile)
            first_tile, first_strip = tile_count, len(strips)

    for members in together:
        for param in members:
            shard = shards[param]
            across = _across(tiling, shard.local_matrix[2])
            for matrix, rows, stop_row in _touched(shard, tiling.rows_of(shard.local_matrix[2])):
                # A matrix that does not fit the rest of a segment begins a new one, so that its
                # sums are added up in the same order whatever comes before it.
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
        blocks.append(Block(slice(members.start, members.stop), tuple(segments)))
        segments.clear()
    return (
        np.concatenate([np.zeros((0, len(TileField)), np.int64), *tiles]),
        np.array(strips, np.int64).reshape(-1, len(StripField)),
        tuple(blocks),
        slots,
    )


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
    table[:, TileField.STOP_ROW] = np.minimum(row.ravel() + bands.rows.step, bands.stop_row)
    return table


def _strips(
    bands: _Bands, across: int, tiling: Tiling, slot: int, shard: Shard, sums: SliceSums
) -> list[list[int]]:
    """Return the strips that add up the bands' tiles: columns downwards, rows side by side.

    Those of columns come first: they take longest.
    """
    batch, rows, columns = shard.local_matrix
    (row_squares, column_squares), (row_residuals, column_residuals) = (
        sums.squares,
        sums.instability,
    )
    strips = []
    for column in range(0, columns, tiling.columns):
        top = slot + column // tiling.columns
        stop = min(column + tiling.columns, columns)
        for first in range(column, stop, tiling.strip):
            count, within = min(tiling.strip, stop - first), tiling.slot_rows + first - column
            place = (bands.matrix * columns + first) * 8
            addresses = [column_squares.data_ptr() + place, column_residuals.data_ptr() + place]
            tiles = len(bands.rows)
            strips.append([top, across, tiles, within, count, *addresses, batch * columns])
    for index, row in enumerate(bands.rows):
        stop = min(row + bands.rows.step, bands.stop_row)
        for first in range(row, stop, tiling.strip):
            count, within = min(tiling.strip, stop - first), first - row
            place = (bands.matrix * rows + first) * 8
            addresses = [row_squares.data_ptr() + place, row_residuals.data_ptr() + place]
            left = slot + index * across
            strips.append([left, 1, across, within, count, *addresses, batch * rows])
    return strips
