"""A progress bar that is also readable in a log file."""

import sys
import time
from typing import TYPE_CHECKING, Self, TextIO

from megatron_came.terminal.console import is_styled, is_terminal

if TYPE_CHECKING:
    from rich import progress as rich_progress

_REDRAW_SECONDS = 0.1
_LONG_SECONDS = 2.0  # work that takes longer is told how long it will go on


class Progress:
    """Show how much of a known amount is done; use it in a ``with`` statement.

    On a terminal it is a bar of ``rich``, elsewhere a line each quarter; both say how long the
    rest will take once that can be told.

    Args:
        label: what is being done, a few words.
        total: the whole amount, in whatever unit :meth:`advance` counts.
        stream: where to write; standard output by default.
        speed: whether the amount is in bytes, and MB/s are shown.
    """

    def __init__(
        self, label: str, total: float, stream: TextIO | None = None, *, speed: bool = False
    ) -> None:
        self._speed, self._quarters, self._drawn_at = speed, 0, 0.0
        self._label, self._total, self._done, self._note = label, total, 0.0, ""
        self._stream = stream or sys.stdout
        self._bar = _bar(self._stream) if is_terminal(self._stream) else None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._bar:
            self._bar.add_task(self._label, total=1.0, note="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._draw(self._bar)
            self._bar.stop()

    def advance(self, amount: float, note: str = "") -> None:
        """Count ``amount`` as done; ``note`` is shown behind the percentage."""
        self.reach(self._done + amount, note)

    def reach(self, done: float, note: str = "") -> None:
        """Count ``done`` of the whole amount as done."""
        self._done = done
        if self._speed:
            note = f", {done / (time.monotonic() - self._started) / 1e6:.1f} MB/s{note}"
        self._note = note
        if self._bar:
            if time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
                self._drawn_at = time.monotonic()
                self._draw(self._bar)
        elif int(4 * self._fraction) > self._quarters:
            self._quarters = int(4 * self._fraction)
            line = f"{self._label}: {self._fraction:4.0%}{self._note}{self._remaining()}"
            print(line, file=self._stream, flush=True)

    @property
    def _fraction(self) -> float:
        return min(1.0, self._done / self._total) if self._total else 1.0

    def _remaining(self) -> str:
        taken = time.monotonic() - self._started
        if taken < _LONG_SECONDS or not 0 < self._fraction < 1:
            return ""
        minutes, seconds = divmod(round(taken / self._fraction - taken), 60)
        return f", {minutes} min {seconds} s left" if minutes else f", {seconds} s left"

    def _draw(self, bar: "rich_progress.Progress") -> None:
        note = self._note + self._remaining()
        bar.update(bar.task_ids[0], completed=self._fraction, note=note)
        bar.refresh()


def _bar(stream: TextIO) -> "rich_progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f}%{task.fields[note]}", markup=False),
        console=Console(file=stream, no_color=not is_styled(stream)),
        auto_refresh=False,  # a thread of its own would be there when workers are forked
        expand=True,
    )
