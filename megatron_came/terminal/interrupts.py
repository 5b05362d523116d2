"""Ctrl-C, SIGTERM and SIGHUP: one line, and nothing that a command has started stays behind."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_came.terminal.children import ENDS

_SIGNALED = 128  # and its number: the status that a shell gives a program that a signal has ended

# Files and folders that are no good unless the work on them is finished, and locks on others.
half_made: set[Path] = set()


def in_one_line(command: Callable[[], int], line: str, *, grace: float | None = 0.7) -> int:
    """Run a command and return its exit status; end it in one line if it is interrupted.

    A signal that was ignored before, as in a job in the background or under ``nohup``, still is.

    Args:
        command: the work.
        line: to print on standard error, where the interrupt of the command brings no other.
        grace: seconds that an interrupted command has to clean up, before its process is ended
            whatever it does: code outside Python (a compiler, a long sum) does not look for
            signals. With 0 it sees nothing of the interrupt: C++ code that calls Python may end in
            an abort if it does. None waits for as long as it takes.
    """
    said = threading.Lock()  # held by whoever says the line
    seen: list[int] = []

    def say(line: str = line) -> None:
        if said.acquire(blocking=False):
            # On a terminal "^C" stands in the line already, and a progress bar may.
            start = "\n" if sys.stderr.isatty() else ""
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{start}{line}\n".encode())

    def interrupt(number: int, _: object) -> None:
        seen.append(number)
        if grace != 0 and len(seen) == 1:  # others must not end the cleaning up
            raise KeyboardInterrupt

    def end(number: int) -> None:
        say()
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # what the command says of children that have ended as well
            os.dup2(nothing, stream)
        _leave_nothing()
        os._exit(_SIGNALED + number)

    with _handled(interrupt), _watched(end, grace, seen):
        try:
            return command()
        except KeyboardInterrupt as interrupted:
            say(str(interrupted) or line)
            _leave_nothing()
            return _SIGNALED + (seen or [signal.SIGINT])[0]


def end_at_once() -> None:
    """Let Ctrl-C end the process where it is, for the seconds that imports take.

    Python would print where in them it was. :func:`end_in_an_exception` undoes it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_in_an_exception() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_nothing() -> None:
    with contextlib.suppress(ModuleNotFoundError):  # half an installation has started nothing
        _end_children()
    for path in list(half_made):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _end_children() -> None:
    """End all processes that this one has started, and what these have left behind."""
    import psutil  # type: ignore[import-untyped]

    children = psutil.Process().children(recursive=True)
    groups = set()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(child.pid))
    for ask, seconds in (("terminate", 0.5), ("kill", 0.2)):
        for child in children:
            with contextlib.suppress(psutil.Error):
                getattr(child, ask)()
        _, children = psutil.wait_procs(children, timeout=seconds)
    for group in groups - {os.getpgrp()}:  # what others have left in these is nobody's child
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def _handled(interrupt: Callable[[int, object], None]) -> Iterator[None]:
    """Let a function handle the signals that are not ignored."""
    before = {number: signal.getsignal(number) for number in ENDS}
    mine = {number: one for number, one in before.items() if one not in (signal.SIG_IGN, None)}
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(end: Callable[[int], None], grace: float | None, seen: list[int]) -> Iterator[None]:
    """Call ``end`` in a thread of its own, ``grace`` seconds after the first signal.

    The signal wakes that thread even while the main thread is in code outside Python.
    """
    if grace is None:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as set_wakeup_fd requires

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] in ENDS:
                time.sleep(grace)
                end(number[0])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if seen and not grace:
            thread.join()  # it ends the process
        signal.set_wakeup_fd(before)
        os.close(writing)
