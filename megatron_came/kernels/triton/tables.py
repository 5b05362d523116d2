"""What the kernels read: tables of addresses, shapes and ranges, one row for each program.

See ``tiling`` for tiles and additions, which vectors do not need.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum, auto
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_came.core import int8
from megatron_came.core.hyperparameters import TABLE
from megatron_came.core.parameter_slice import ParameterSlice, SliceSums
from megatron_came.core.shard import Shard

IntTable = npt.NDArray[np.int64]


class ParamField(IntEnum):
    """Columns of the tables of parameters. Addresses point to fp32 unless said otherwise.

    A vector is a matrix of one column without column statistics and instability.
    """

    # What others may change between steps.
    PARAM = 0  # address of the slice; bf16 where there are remainders
    GRAD = auto()  # fp32 or bf16
    EXP_AVG = auto()  # fp32, bf16 or int8
    EXP_AVG_SCALE = auto()  # of blocks of the slice, for int8; otherwise 0
    REMAINDER = auto()  # int16, the lower halves of fp32 weights, or 0
    MODEL_WEIGHT = auto()  # 16-bit copy of the slice, or 0
    GRAD_IS_BF16 = auto()  # read by the kernels of vectors alone, as are the next two: see Kind
    MODEL_IS_BF16 = auto()  # otherwise fp16
    EXP_AVG_IS_BF16 = auto()
    SQUARE_ROW_FACTOR = auto()  # r, (batch, rows)
    SQUARE_COLUMN_FACTOR = auto()  # c, (batch, columns)
    INSTABILITY_ROW_FACTOR = auto()  # R
    INSTABILITY_COLUMN_FACTOR = auto()  # C
    # Geometry.
    KEY = auto()  # of the parameter's random bits
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
    SQUARE_ROW_SUMS = auto()  # of g^2, (batch, rows); of a vector g^2 itself
    SQUARE_COLUMN_SUMS = auto()
    TOTAL = auto()  # of u^2
    INSTABILITY_ROW_SUMS = auto()  # of e^2, u e and u^2, (3, batch, rows)
    INSTABILITY_COLUMN_SUMS = auto()
    # Results of the factors, in the scale buffer.
    ROW_SCALE = auto()  # (batch, rows)
    COLUMN_SCALE = auto()
    ROW_CONFIDENCE = auto()
    COLUMN_CONFIDENCE = auto()
    FIRST_MATRIX = auto()  # row of the first matrix in the table of clip divisors


class Kind(NamedTuple):
    """What of a matrix parameter is compiled into the kernels that take its tiles or blocks.

    A vector's is told apart when they run.

    Attributes:
        ALIGNED: whether addresses, widths and bounds allow vector loads, of four elements.
        GRAD_IS_BF16: otherwise fp32.
        EXP_AVG_IS_BF16: otherwise fp32 or int8.
        INT8: of momentum, 0: it is not; 1: its blocks are rows of tiles; 2: they are not.
        HAS_REMAINDER: whether weights are in two halves.
        MODEL: 16-bit copies, 0: there are none; 1: bf16; 2: fp16.
    """

    ALIGNED: bool = True
    GRAD_IS_BF16: bool = False
    EXP_AVG_IS_BF16: bool = False
    INT8: int = 0
    HAS_REMAINDER: bool = False
    MODEL: int = 0


def blocks_are_rows(shard: Shard, tile_columns: int) -> bool:
    """Whether the blocks of int8 momentum of a slice are the rows of its tiles."""
    return tile_columns == int8.BLOCK and (shard.start | shard.local_matrix[2]) % int8.BLOCK == 0


class TileField(IntEnum):
    """Columns of the table of tiles."""

    PARAM = 0  # row of the table of matrix parameters
    MATRIX = 1  # of the parameter's batch
    ROW = 2  # first row
    STOP_ROW = 3
    COLUMN = 4  # first column
    SUMS = 5  # where its sums begin in the scratch buffer, of fp32


class BlocksField(IntEnum):
    """Columns of the table of blocks of int8 momentum: some that lie one after another."""

    PARAM = 0  # row of the table of matrix parameters
    FIRST = 1  # first element, in the slice
    STOP = 2
    MATRIX = 3  # of the first element, in the parameter's batch
    ROW = 4  # of it in the matrix
    COLUMN = 5


class FactorField(IntEnum):
    """Columns of the table of factors: a row for each range of a row or column factor.

    Those of a matrix's row factor come first, then those of its column factor.
    """

    PARAM = 0  # row of the table of matrix parameters
    MATRIX = 1  # of the parameter's batch
    TOP = 2  # row of the matrix's first range


class AdditionField(IntEnum):
    """Columns of the table of additions: of tiles' sums to the buffers of sums."""

    SUMS = 0  # where the first tile's begin in the scratch buffer
    STRIDE = 1  # from there to the next tile's
    TILES = 2  # how many
    COUNT = 3  # sums of each
    SQUARES = 4  # address of the first sum, float64
    INSTABILITY = 5  # address of the first sum of e^2, float64
    INSTABILITY_STRIDE = 6  # elements from there to u e, and on to u^2


# Columns of the table of hyperparameters, float64, a row for each parameter group; STEP counts the
# steps before this one, for random bits, and is 0 where nothing is rounded with them.
_enum: Any = IntEnum  # of which type checkers want the members written out
GroupField = _enum(
    "GroupField", ["LR", "WEIGHT_DECAY", *(row.name.upper() for row in TABLE), "STEP"], start=0
)


TABLES = ParamField, TileField, BlocksField, FactorField, AdditionField, GroupField
# Changes when a column moves: compiled kernels that were kept must not outlive their tables.
FINGERPRINT = zlib.crc32(repr([list(fields.__members__) for fields in TABLES]).encode())


def param_row(
    slice_: ParameterSlice, sums: SliceSums, group: int, scales: Sequence[Tensor]
) -> IntTable:
    """Describe a parameter.

    Args:
        slice_: the parameter.
        sums: where its sums go.
        group: row of its group's hyperparameters.
        scales: of a matrix row and column scale, row and column confidence.
    """
    field, shard = ParamField, slice_.shard
    row = np.zeros(len(field), np.int64)
    row[field.KEY] = slice_.key
    row[field.START], row[field.STOP] = shard.start, shard.stop
    row[field.BATCH], row[field.ROWS], row[field.COLUMNS] = shard.local_matrix
    row[field.FULL_ROWS], row[field.FULL_COLUMNS] = shard.full_rows, shard.full_columns
    row[field.FULL_NUMEL] = shard.full_numel
    row[field.ROWS_ARE_WHOLE] = shard.tp_axis != "rows"
    row[field.COLUMNS_ARE_WHOLE] = shard.tp_axis != "columns"
    row[field.BATCH_OFFSET : field.COLUMN_OFFSET + 1] = shard.offsets
    row[field.PART_ROWS], row[field.PART_JUMP] = shard.row_parts
    row[field.GROUP] = group
    for first, tensors in (
        (field.SQUARE_ROW_SUMS, sums.squares),
        (field.TOTAL, (sums.total,)),
        (field.INSTABILITY_ROW_SUMS, sums.instability),
        (field.ROW_SCALE, scales),
    ):
        row[first : first + len(tensors)] = [tensor.data_ptr() for tensor in tensors]
    return row
