"""Launches of the kernels: their arguments are named as what tables and sizes there are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron_came.kernels.triton.schedule import Schedule
from megatron_came.kernels.triton.tiling import Tiling

# Of the kernels that take tiles or blocks: each warp has a row, or a block, at a time.
WARPS = STEP = 8
# With so many, an SM of 65536 holds 24 warps.
REGISTERS = 80
# Elements of a vector or of a range of a factor, and tiles of an addition, that are read at once.
BLOCK, ADDITION_TILES = 1024, 16
# Elements of a vector in pass 3: of more, registers do not hold what it reads.
APPLIED = 512
# Ranges of a factor, and row sums, that are added up at once.
RANGES, MANY = 128, 4096


@dataclass(slots=True)
class Tables:
    """What the kernels read and write, on their device; see ``kernels.triton.tables``.

    Arrays lie in one piece, row by row: kernels are given their addresses.

    Attributes:
        tiling: how the matrices are cut.
        matrices: table of ``ParamField``.
        vectors: table of ``ParamField``.
        tiles: table of ``TileField``.
        blocks: table of ``BlocksField``; empty unless momentum is int8.
        additions: table of ``AdditionField``.
        factors: table of ``FactorField``.
        groups: table of ``GroupField``, float64.
        divisors: (matrices, 2), fp32: 1/d0 and 1/d.
        partials: (factors, 2), float64.
        scratch: of ``tiling.tile_floats`` for each tile, fp32.
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
    partials: Any
    scratch: Any

    @property
    def addresses(self) -> list[int]:
        """Where the arrays lie: all that changes of the arguments while the tiling stays."""
        return [getattr(self, name).data_ptr() for name in _ARRAYS]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of kernels, by name, but those of a launch."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | constants(self.tiling)


_ARRAYS = [field.name for field in fields(Tables) if field.name != "tiling"]


def constants(tiling: Tiling) -> dict[str, int]:
    """Return the sizes that are compiled into kernels, by name."""
    return {
        "COLUMNS": tiling.columns,
        "STEP": STEP,
        "TILES": ADDITION_TILES,
        "COUNT": tiling.addition,
        "BLOCK": BLOCK,
        "APPLIED": APPLIED,
        "RANGES": RANGES,
        "MANY": MANY,
    }


def options_of(kernel: Any) -> dict[str, int]:
    """Return how Triton is to compile a kernel; those over factors have small programs."""
    is_of_factors = "factors" in kernel.arg_names
    return {"num_warps": 4 if is_of_factors else WARPS, "maxnreg": REGISTERS}


def run(tables: Tables, schedule: Schedule) -> None:
    """Launch what a schedule lists, on the current stream of the current device."""
    arguments = tables.arguments
    for kernel, rows, constants, sums in schedule:
        given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        given |= constants
        kernel[rows.stop - rows.start, sums](rows.start, **given, **options_of(kernel))
