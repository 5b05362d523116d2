"""Tables of bytes."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

# Of a table's cell, where there is nothing to say.
EMPTY = ""


def unit_of(largest: int) -> tuple[str, int]:
    """The largest unit that ``largest`` bytes are at least one of, and its bytes."""
    return next((unit for unit in _UNITS if largest >= unit[1]), _UNITS[-1])


def human(size: float) -> str:
    """A size with its unit."""
    name, unit = unit_of(int(abs(size)))
    return f"{size / unit:.2f} {name}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]


def bytes_table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[int | None]]]
) -> list[str]:
    """A table of bytes in one unit, which its upper left corner names.

    Args:
        heads: of the columns of bytes.
        rows: label and bytes by column; None leaves a cell empty.
    """
    name, unit = unit_of(max((size or 0 for _, sizes in rows for size in sizes), default=0))
    cells = [
        [label, *(EMPTY if size is None else f"{size / unit:.3f}" for size in sizes)]
        for label, sizes in rows
    ]
    return table([[name, *heads], *cells])
