"""A progress bar that is also readable in a log file."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

_WIDTH = 30
_REDRAW_SECONDS = 0.1


class Progress:
    """Shows how much of a known amount is done; use it in a ``with`` statement.

    On a terminal it is one line that is drawn again and again, elsewhere one plain line each
    quarter.

    Args:
        label: What is being done, a few words.
        total: The whole amount, in whatever unit ``advance`` counts.
        stream: Where to write; standard output by default.
    """

    def __init__(self, label: str, total: float, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = total
        self._stream = stream if stream is not None else sys.stdout
        self._terminal = self._stream.isatty()
        self._done = 0.0
        self._note = ""
        self._quarters = 0
        self._drawn_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, amount: float, note: str = "") -> None:
        """Counts ``amount`` as done; ``note`` is shown behind the percentage."""
        self._done += amount
        self._note = note
        now = time.monotonic()
        if self._terminal:
            if now - self._drawn_at >= _REDRAW_SECONDS:
                self._drawn_at = now
                self._draw()
        elif int(4 * self._fraction) > self._quarters:
            self._quarters = int(4 * self._fraction)
            line = f"{self._label}: {self._fraction:4.0%}{self._note}"
            print(line, file=self._stream, flush=True)

    @property
    def _fraction(self) -> float:
        return min(1.0, self._done / self._total) if self._total else 1.0

    def _draw(self) -> None:
        filled = int(_WIDTH * self._fraction)
        bar = "#" * filled + "." * (_WIDTH - filled)
        # The escape sequence clears what a longer line may have left behind.
        self._stream.write(f"\r{self._label} [{bar}] {self._fraction:4.0%}{self._note}\x1b[K")
        self._stream.flush()
