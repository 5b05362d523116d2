"""Launches of the kernels: their arguments are named as what tables and sizes there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_came.core.int8 import BLOCK as INT8_BLOCK
from megatron_came.kernels.triton.schedule import Schedule
from megatron_came.kernels.triton.tables import MatrixField
from megatron_came.kernels.triton.tiling import Tiling

# Rows of a tile, elements of a factor or vector, and tiles of an addition that are read at once.
STEP, BLOCK, ADDITION_TILES = 8, 1024, 16
# Of the kernels that take tiles or blocks.
WARPS = 8


@dataclass(slots=True)
class Tables:
    """What the kernels read and write, on their device; see ``kernels.triton.tables``.

    Arrays lie in one piece, row by row: kernels are given their addresses.

    Attributes:
        tiling: how the matrices are cut.
        matrices: table of ``MatrixField``.
        vectors: table of ``VectorField``.
        tiles: table of ``TileField``.
        blocks: table of ``BlocksField``; empty unless momentum is int8.
        additions: table of ``AdditionField``.
        factors: (matrices, 2): matrix parameter and place in its batch.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        scratch: (tiles, 3, ``tiling.tile_sums``), fp32.
        aligned: whether the matrices allow vector loads.
    """

    tiling: Tiling
    matrices: Any
    vectors: Any
    tiles: Any
    blocks: Any
    additions: Any
    factors: Any
    groups: Any
    divisors: Any
    scratch: Any
    aligned: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of kernels, by name, but those of a launch."""
        return {
            "matrices": self.matrices,
            "vectors": self.vectors,
            "tiles": self.tiles,
            "blocks": self.blocks,
            "additions": self.additions,
            "factors": self.factors,
            "groups": self.groups,
            "divisors": self.divisors,
            "scratch": self.scratch,
            "ALIGNED": self.aligned,
            **constants(self.tiling),
        }


def constants(tiling: Tiling) -> dict[str, int]:
    """Return the sizes that are compiled into kernels, by name."""
    return {
        "ROWS": tiling.most_rows,
        "COLUMNS": tiling.columns,
        "STEP": STEP,
        "WIDTH": tiling.tile_sums,
        "TILES": ADDITION_TILES,
        "COUNT": tiling.addition,
        "BLOCK": BLOCK,
        "BLOCKS": tiling.block_elements // INT8_BLOCK,
    }


def run(tables: Tables, schedule: Schedule) -> None:
    """Launch what a schedule lists, on the current stream of the current device."""
    arguments = tables.arguments
    for kernel, rows, kinds in schedule:
        given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        if kinds:
            given["SQUARES"] = kinds == 1
        if "COLUMNS" in given or "BLOCKS" in given:
            given["num_warps"] = WARPS
        kernel[rows.stop - rows.start, max(kinds, 1)](rows.start, **given)


def aligned(matrices: npt.NDArray[np.int64]) -> bool:
    """Whether all rows of a table of matrices allow vector loads."""
    addresses = matrices[:, [MatrixField.PARAM, MatrixField.GRAD, MatrixField.EXP_AVG]]
    elements = matrices[:, [MatrixField.START, MatrixField.STOP, MatrixField.COLUMNS]]
    halves = matrices[:, [MatrixField.MODEL_WEIGHT, MatrixField.REMAINDER]]
    return bool(
        (addresses % 16 == 0).all() and (halves % 8 == 0).all() and (elements % 4 == 0).all()
    )
