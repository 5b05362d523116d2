"""Processes that end with the one that started them, and signals that wait."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Let Ctrl-C and its like end a command when the body is done; what it starts sees none."""
    held: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        # A signal that this thread blocks may reach another one, and Python's handler runs here.
        for number in ENDS:
            if signal.getsignal(number) is not None:  # else it is a handler of C's
                handlers[number] = signal.signal(number, lambda number, _: held.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the thread that started it ends, even of SIGKILL.

    The parent, named by its process id, may be dead already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def run_alone(
    command: Sequence[str], *, environment: Mapping[str, str], seconds: float, grace: float = 0.0
) -> subprocess.CompletedProcess[str]:
    """Run a command, which reads nothing, and kill what it leaves running, or all on an interrupt.

    What it leaves in the background has some seconds of grace, to end by itself.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
    """
    process, parent = None, os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        end_with_parent(parent)

    try:
        with signals_held_back():  # none comes between the start and the knowledge of it
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=prepare,
            )
        stdout, stderr = process.communicate(timeout=seconds)
        end = time.monotonic() + grace
        with contextlib.suppress(ProcessLookupError, PermissionError):  # there is nothing
            while time.monotonic() < end:
                os.killpg(process.pid, 0)
                time.sleep(0.02)
    finally:
        if process:
            with signals_held_back():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
