"""Text in the columns that there are: tables, sentences, and bold heads on a terminal.

``rich`` is imported when something is written to a terminal. Elsewhere lines are plain, and have
80 columns or as many as ``COLUMNS`` says.
"""

import importlib.util
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

_GAP = "  "
_LABEL = 16  # columns that a label has at least, where it takes several lines


def open_streams() -> None:
    """Let anything be written to both streams, closed by who called (as with ``>&-``) or not.

    What a locale's letters do not have, such as a file's name of others', is written in escapes.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def width() -> int:
    """Return how many columns there are: the terminal's or ``COLUMNS``, 80 if neither says so."""
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
    """
    limit = width() if columns is None else columns
    cells = [[[cell] for cell in row] for row in rows]
    if sum(_widths(cells)) > limit + len(_GAP):
        cells[0] = [head.split() or [""] for head in rows[0]]
    label, *others = _widths(cells)
    room = limit - sum(others)
    if _LABEL <= room < label - len(_GAP):
        for row in cells[1:]:
            row[0] = textwrap.wrap(row[0][0], room, subsequent_indent=_GAP) or [""]
    widths = _widths(cells)
    blocks = [[0]]  # the columns of each table: the first one, and as many others as fit
    for column in range(1, len(widths)):
        wanted = sum(widths[each] for each in [*blocks[-1], column])
        if len(blocks[-1]) > 1 and wanted > limit + len(_GAP):
            blocks.append([0])
        blocks[-1].append(column)
    lines = [line for chosen in blocks for line in ["", *_lines(cells, chosen, widths)]]
    return lines[1:]


def _widths(cells: Sequence[Sequence[Sequence[str]]]) -> list[int]:
    """Return the columns that each column of cells takes, with the gap behind it."""
    columns = zip(*cells, strict=True)
    return [max(len(line) for cell in col for line in cell) + len(_GAP) for col in columns]


def _lines(
    cells: Sequence[Sequence[list[str]]], chosen: Sequence[int], widths: Sequence[int]
) -> Iterator[str]:
    for row in cells:
        height = max(len(row[column]) for column in chosen)
        tall = [[""] * (height - len(row[column])) + row[column] for column in chosen]
        if row is not cells[0]:
            tall[0] = row[0] + [""] * (height - len(row[0]))  # a label begins at the top
        for label, *others in zip(*tall, strict=True):
            line = label.ljust(widths[0] - len(_GAP))
            for word, column in zip(others, chosen[1:], strict=True):
                line += word.rjust(widths[column])
            yield Head(line.rstrip()) if row is cells[0] else line.rstrip()


def wrapped(
    text: str, columns: int | None = None, *, hang: str = "", whole: bool = True
) -> list[str]:
    """Break a sentence at spaces; lines after the first are indented as it is, and by ``hang``.

    A word that is longer than a line is left ``whole`` or not.
    """
    indent = text[: len(text) - len(text.lstrip())] + hang
    limit = width() if columns is None else columns
    wrapper = textwrap.TextWrapper(
        limit, subsequent_indent=indent, break_long_words=not whole, break_on_hyphens=False
    )
    return wrapper.wrap(text) or [""]


def counted(number: int, thing: str) -> str:
    """A number of things, in words: "1 document", "2,000 documents"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def show(lines: Iterable[str]) -> None:
    """Print lines as they are; a :class:`Head` is bold where that can be seen."""
    if not is_styled(sys.stdout):
        try:
            sys.stdout.writelines(f"{line}\n" for line in lines)
            sys.stdout.flush()
        except OSError as error:  # of nobody's file; what was to be printed is dropped
            raise BrokenPipeError(*error.args) from error
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text(line, style="bold" if isinstance(line, Head) else ""))
