"""Text in the columns that there are: tables, sentences, and bold heads on a terminal.

A terminal is as wide as it says, or as ``COLUMNS`` says; elsewhere lines have 80 columns, and are
plain. Nothing here imports more than the standard library until it writes to a terminal.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

_GAP = "  "
_LABEL = 16  # columns that a label has at least, where it takes several lines


def width() -> int:
    """How many columns there are: the terminal's or ``COLUMNS``, 80 where neither says so."""
    return max(shutil.get_terminal_size((80, 24)).columns, 20)


def is_styled(stream: TextIO) -> bool:
    """Whether bold letters and colours belong there: a terminal that nobody wants plain."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def is_terminal(stream: TextIO) -> bool:
    """Whether a line there can be drawn again, by ``rich``, without which it is plain text."""
    # scripts/gpu_check.py runs where nothing but PyTorch and Triton is installed.
    has_rich = importlib.util.find_spec("rich") is not None
    return stream.isatty() and os.environ.get("TERM") != "dumb" and has_rich


class Head(str):
    """A line that stands above others: bold where that can be seen."""

    __slots__ = ()


def table(rows: Sequence[Sequence[str]], columns: int | None = None) -> list[str]:
    """Align rows of cells: the first column to the left, the others to the right.

    What is too wide gets heads (its first row) of several lines, then labels (its first column) of
    several lines; where that does not do either, it becomes several tables, one below the other.

    Args:
        rows: all of one length.
        columns: to fit; those of :func:`width` by default.
    """
    limit = width() if columns is None else columns
    cells = [[[cell] for cell in row] for row in rows]
    if _total(_widths(cells)) > limit:
        cells[0] = [head.split() or [""] for head in rows[0]]
    widths = _widths(cells)
    room = limit - (_total(widths) - widths[0])
    if _LABEL <= room < widths[0]:
        for row in cells[1:]:
            row[0] = textwrap.wrap(row[0][0], room, subsequent_indent=_GAP) or [""]
    widths = _widths(cells)
    lines: list[str] = []
    for chosen in _blocks(widths, limit):
        lines += [""] if lines else []
        for row in cells:
            height = max(len(row[column]) for column in chosen)
            tall = [[""] * (height - len(row[column])) + row[column] for column in chosen]
            if row is not cells[0]:
                tall[0] = row[0] + [""] * (height - len(row[0]))  # a label begins at the top
            for words in zip(*tall, strict=True):
                line = _line(words, [widths[column] for column in chosen])
                lines.append(Head(line) if row is cells[0] else line)
    return lines


def _blocks(widths: Sequence[int], limit: int) -> list[list[int]]:
    """The columns of each table: the first one, and as many others as fit, at least one."""
    blocks: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        wanted = _total([widths[each] for each in [*blocks[-1], column]])
        if len(blocks[-1]) > 1 and wanted > limit:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _widths(cells: Sequence[Sequence[Sequence[str]]]) -> list[int]:
    columns = zip(*cells, strict=True)
    return [max(len(line) for cell in column for line in cell) for column in columns]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    others = (cell.rjust(wide) for cell, wide in zip(rest, widths[1:], strict=True))
    return _GAP.join([first.ljust(widths[0]), *others]).rstrip()


def wrapped(text: str, columns: int | None = None) -> list[str]:
    """Break a sentence into lines, at spaces; lines after the first are indented as it is.

    Args:
        text: one line of any length.
        columns: to fit; those of :func:`width` by default.
    """
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text,
        width() if columns is None else columns,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def show(lines: Iterable[str], stream: TextIO | None = None) -> None:
    """Print lines as they are; a :class:`Head` is bold where that can be seen.

    Args:
        lines: to print.
        stream: standard output by default.
    """
    stream = stream if stream is not None else sys.stdout
    if not is_styled(stream):
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text(line, style="bold" if isinstance(line, Head) else ""))
