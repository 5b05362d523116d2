"""How the slices of matrix parameters are cut into what the kernels take.

The slice of a matrix parameter is cut into *tiles*, as a :class:`Tiling` says. A tile sums its rows
and columns into its place in a scratch buffer, and *additions* then add up, in a fixed order, what
the tiles beside or below one another hold. A *fill* is as many tiles as the scratch buffer holds;
where launches cost time, tiles of large models are higher instead, so that there are few fills. A
*set* is of matrices that go through passes by themselves: where no sum goes over ranks, those that
together fit the cache go through all passes before the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megatron_came.core.parameter_slice import SliceSums
from megatron_came.core.shard import Shard
from megatron_came.kernels.triton.tables import (
    AdditionField,
    BlocksField,
    FactorField,
    IntTable,
    TileField,
    blocks_are_rows,
)

# Offsets in a tile are below this, and fit 32 bits.
MOST_OFFSETS = 2**30
# Of the scratch buffer, for each of a tile's columns and rows: as many as are read at once.
SUM_FLOATS = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a device's kernels cut matrices.

    Attributes:
        rows: of a tile.
        columns: of a tile, at most.
        scratch_tiles: whose sums the scratch buffer holds, at most.
        addition: sums of an addition, at most.
        block_elements: of a row of the table of blocks.
        tallest: rows that tiles may have where there are more than fit the scratch buffer.
    """

    rows: int
    columns: int
    scratch_tiles: int
    addition: int = 256
    block_elements: int = 16384
    tallest: int = 0

    @property
    def tile_floats(self) -> int:
        """Numbers that the scratch buffer has room for of a tile: of its columns, then its rows."""
        return SUM_FLOATS * (self.columns + self.rows)

    def across(self, columns: int) -> int:
        """Tiles that lie side by side."""
        return -(-columns // self.columns)


def with_higher_tiles(tiling: Tiling, shards: Sequence[Shard]) -> Tiling:
    """Make tiles higher until all of them share the scratch buffer, if they may be so high.

    The order of a matrix's sums then depends on how many others there are; ranks that hold the same
    matrix, and must agree in the last bit, hold the same others, or agree on the sums themselves.

    Args:
        tiling: sizes.
        shards: of the matrix parameters.
    """
    widest = max((shard.local_matrix[2] for shard in shards), default=0)
    tallest = min(tiling.tallest, MOST_OFFSETS // max(widest, 1))
    while 2 * tiling.rows <= tallest and _count_tiles(tiling, shards) > tiling.scratch_tiles:
        tiling = replace(tiling, rows=2 * tiling.rows)
    return tiling


def _count_tiles(tiling: Tiling, shards: Sequence[Shard]) -> int:
    count = 0
    for shard in shards:
        rows = sum(len(each.rows) for each in _tile_rows(0, shard, tiling.rows))
        count += tiling.across(shard.local_matrix[2]) * rows
    return count


def cut_blocks(shards: Sequence[Shard], tiling: Tiling) -> IntTable:
    """Cut the slices whose blocks of int8 momentum are not rows of tiles, as ``BlocksField``.

    Args:
        shards: of the matrix parameters, in the order of their table.
        tiling: sizes.
    """
    tables = [np.zeros((0, len(BlocksField)), np.int64)]
    for param, shard in enumerate(shards):
        _, rows, columns = shard.local_matrix
        if shard.numel and not blocks_are_rows(shard, tiling.columns):
            first = np.arange(0, shard.numel, tiling.block_elements, dtype=np.int64)
            stop = np.minimum(first + tiling.block_elements, shard.numel)
            row, column = np.divmod(first + shard.start, columns)
            place = [*np.divmod(row, rows), column]
            tables.append(np.stack([np.full_like(first, param), first, stop, *place], axis=1))
    return np.concatenate(tables)


def cut_factors(shards: Sequence[Shard], elements: int) -> IntTable:
    """Cut the factors of matrix parameters into rows of ``FactorField``.

    Args:
        shards: in the order of their table.
        elements: of a range.
    """
    rows: list[list[int]] = []
    for param, shard in enumerate(shards):
        batch, *sizes = shard.local_matrix
        ranges = sum(-(-size // elements) for size in sizes)
        for matrix in range(batch):
            rows += [[param, matrix, len(rows)]] * ranges
    return np.array(rows, np.int64).reshape(-1, len(FactorField))


class Fill(NamedTuple):
    """Rows of the tables of tiles that fill the scratch buffer, and of additions that empty it."""

    tiles: slice
    additions: slice


class MatrixSet(NamedTuple):
    """Matrices that go through the passes together, and the tiles that they are cut into."""

    matrices: slice
    fills: tuple[Fill, ...]


def in_cache(sizes: Sequence[int], limit: int | None) -> Iterator[range]:
    """Put matrices together that fit the cache.

    Args:
        sizes: elements of each.
        limit: of a set that has more than one matrix; None for a single set.
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
) -> tuple[IntTable, IntTable, tuple[MatrixSet, ...], int]:
    """Cut the slices of matrix parameters.

    Args:
        shards: of the matrix parameters, in the order of their table.
        sums: likewise.
        tiling: sizes.
        together: the matrices of each set.

    Returns:
        Table of tiles, table of additions, sets, and the tiles of the largest fill.
    """
    tiles: list[IntTable] = []
    additions: list[list[int]] = []
    fills: list[Fill] = []
    sets: list[MatrixSet] = []
    tile_count = first_tile = first_addition = most_tiles = 0

    def end_fill() -> None:
        nonlocal first_tile, first_addition, most_tiles
        if tile_count > first_tile:
            filled = slice(first_tile, tile_count)
            fills.append(Fill(filled, slice(first_addition, len(additions))))
            most_tiles = max(most_tiles, tile_count - first_tile)
            first_tile, first_addition = tile_count, len(additions)

    for members in together:
        for param in members:
            shard = shards[param]
            across = tiling.across(shard.local_matrix[2])
            for rest in _tile_rows(param, shard, tiling.rows):
                # A matrix that does not fit the rest of the scratch buffer begins a new fill, so
                # that its sums are added up in the same order whatever comes before it.
                if tile_count - first_tile + len(rest.rows) * across > tiling.scratch_tiles:
                    end_fill()
                while rest.rows:
                    some = rest._replace(rows=rest.rows[: max(tiling.scratch_tiles // across, 1)])
                    rest = rest._replace(rows=rest.rows[len(some.rows) :])
                    number = tile_count - first_tile
                    tiles.append(_tiles(some, across, tiling, number))
                    additions += _additions(some, across, tiling, number, shard, sums[param])
                    tile_count += len(some.rows) * across
                    if rest.rows:
                        end_fill()
        end_fill()
        sets.append(MatrixSet(slice(members.start, members.stop), tuple(fills)))
        fills.clear()
    return (
        np.concatenate([np.zeros((0, len(TileField)), np.int64), *tiles]),
        np.array(additions, np.int64).reshape(-1, len(AdditionField)),
        tuple(sets),
        most_tiles,
    )


class _TileRows(NamedTuple):
    """Rows of tiles of one matrix that follow one another."""

    param: int
    matrix: int
    rows: range  # first rows of the tiles
    stop_row: int


def _tile_rows(param: int, shard: Shard, height: int) -> Iterator[_TileRows]:
    """Yield what a slice touches of each part of each matrix of its batch.

    So that the rows of a tile follow one another in the full tensor as well, see
    ``Shard.row_parts``.
    """
    _, rows, columns = shard.local_matrix
    if shard.start == shard.stop:
        return
    part_rows, _ = shard.row_parts
    first, stop = shard.start // columns, -(-shard.stop // columns)
    for matrix in range(first // rows, -(-stop // rows)):
        low, high = max(first - matrix * rows, 0), min(stop - matrix * rows, rows)
        for part in range(low // part_rows, -(-high // part_rows)):
            top, bottom = max(low, part * part_rows), min(high, (part + 1) * part_rows)
            yield _TileRows(param, matrix, range(top, bottom, height), bottom)


def _tiles(some: _TileRows, across: int, tiling: Tiling, number: int) -> IntTable:
    """Return their tiles, row by row, from a number in the scratch buffer."""
    row, column = np.meshgrid(
        np.array(some.rows, np.int64),
        np.arange(across, dtype=np.int64) * tiling.columns,
        indexing="ij",
    )
    table = np.empty((row.size, len(TileField)), np.int64)
    table[:, TileField.PARAM], table[:, TileField.MATRIX] = some.param, some.matrix
    table[:, TileField.ROW], table[:, TileField.COLUMN] = row.ravel(), column.ravel()
    table[:, TileField.STOP_ROW] = np.minimum(row.ravel() + some.rows.step, some.stop_row)
    table[:, TileField.SUMS] = (number + np.arange(row.size)) * tiling.tile_floats
    return table


def _additions(
    some: _TileRows, across: int, tiling: Tiling, number: int, shard: Shard, sums: SliceSums
) -> list[list[int]]:
    """Return what adds up the sums of tiles: of columns downwards, of rows side by side.

    Those of columns come first: they take longest.

    Args:
        some: the tiles.
        across: how many lie side by side.
        tiling: sizes.
        number: of the first tile in the scratch buffer.
        shard: of the parameter.
        sums: to which they are added.
    """
    batch, rows, columns = shard.local_matrix
    row_sums, column_sums = zip(sums.squares, sums.instability, strict=True)
    size, additions = tiling.tile_floats, []

    for left in range(0, columns, tiling.columns):
        top = (number + left // tiling.columns) * size
        stop = min(left + tiling.columns, columns)
        for first in range(left, stop, tiling.addition):
            count, place = min(tiling.addition, stop - first), top + SUM_FLOATS * (first - left)
            offset = (some.matrix * columns + first) * 8
            addresses = [each.data_ptr() + offset for each in column_sums]
            tiles = len(some.rows)
            additions.append([place, across * size, tiles, count, *addresses, batch * columns])
    for index, row in enumerate(some.rows):
        leftmost = (number + index * across) * size + SUM_FLOATS * tiling.columns
        stop = min(row + some.rows.step, some.stop_row)
        for first in range(row, stop, tiling.addition):
            count, place = min(tiling.addition, stop - first), leftmost + SUM_FLOATS * (first - row)
            offset = (some.matrix * rows + first) * 8
            addresses = [each.data_ptr() + offset for each in row_sums]
            additions.append([place, size, across, count, *addresses, batch * rows])
    return additions
