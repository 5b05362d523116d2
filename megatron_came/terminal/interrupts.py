"""Ctrl-C: one line, exit status 130, and nothing that a command has started stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

STATUS = 130  # what a shell gives a program that SIGINT has ended


def in_one_line(command: Callable[[], int], line: str, *, grace: float | None = 0.7) -> int:
    """Run a command and return its exit status; end it in one line if it is interrupted.

    Args:
        command: the work.
        line: to print on standard error.
        grace: seconds that an interrupted command has to clean up, before its process is ended
            whatever it does: code outside Python (a compiler, a long sum) does not look for
            signals. With 0 it sees nothing of the interrupt: C++ code that calls Python may end in
            an abort if it does. None waits for as long as it takes.
    """
    said = threading.Lock()  # held by whoever says the line

    def say() -> None:
        if said.acquire(blocking=False):
            # On a terminal "^C" stands in the line already, and a progress bar may.
            start = "\n" if sys.stderr.isatty() else ""
            os.write(2, f"{start}{line}\n".encode())

    def end() -> None:
        say()
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # what the command says of children that have ended as well
            os.dup2(nothing, stream)
        _end_children()
        os._exit(STATUS)

    try:
        with _watch(end, grace) if grace is not None else contextlib.nullcontext():
            return command()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not end the cleaning up
        say()
        _end_children()
        return STATUS


def _end_children() -> None:
    """End all processes that this one has started, and those that they have started."""
    import psutil  # type: ignore[import-untyped]

    children = psutil.Process().children(recursive=True)
    for ask, seconds in (("terminate", 0.5), ("kill", 0.2)):
        for child in children:
            with contextlib.suppress(psutil.Error):
                getattr(child, ask)()
        _, children = psutil.wait_procs(children, timeout=seconds)


@contextlib.contextmanager
def _watch(end: Callable[[], None], grace: float) -> Iterator[None]:
    """Call ``end`` in a thread of its own, ``grace`` seconds after the first SIGINT.

    The signal wakes that thread even while the main thread is in code outside Python.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as set_wakeup_fd requires
    interrupted = threading.Event()

    def wait() -> None:
        while signum := os.read(reading, 1):
            if signum[0] == signal.SIGINT:
                time.sleep(grace)
                end()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    handler = signal.getsignal(signal.SIGINT)
    if not grace:
        signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if interrupted.is_set():
            thread.join()  # it ends the process
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, handler)
        os.close(writing)
