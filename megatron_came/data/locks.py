"""A lock on a file that is being written: one process at a time, on one machine or on several."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_came.terminal.children import signals_held_back
from megatron_came.terminal.interrupts import half_made
from megatron_came.terminal.sentences import CommandError

# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, ``.NAME.lock`` beside it, which says who holds it.

    The system lets go of the lock when its process dies, so what a killed one leaves behind is
    taken over. Where two machines share the folder they share the lock too, if their file system
    has locks; if it has none, or none between machines, what is written in the lock decides.

    Raises:
        CommandError: If another process holds it.
        OSError: If it cannot be made.
    """
    lock = path.with_name(f".{path.name}.lock")
    file = None
    while file is None:
        file = _acquire(lock, path)
    try:
        half_made.add(lock)
        yield
    finally:
        with signals_held_back():
            lock.unlink(missing_ok=True)  # first: nobody else may hold what has no name any more
            os.close(file)
            half_made.discard(lock)


def _acquire(lock: Path, path: Path) -> int | None:
    """Return the open lock; None if whoever held it removed it after it was opened."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        free = _try(file)
        holder = os.pread(file, 200, 0).decode(errors="replace").split()
        if free is False or _is_at_work(holder, died=free is True):
            pid, machine = holder if len(holder) == 2 else ("unknown", "unknown")
            raise CommandError(
                f"{path} is being written by process {pid} on {machine}: wait until it ends, or"
                f" give another name; if there is no such process, remove {lock}."
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _try(file: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_at_work(holder: list[str], *, died: bool) -> bool:
    """Whether who is named in a lock, process and machine, may be writing; not if it ``died``."""
    if len(holder) != 2 or not holder[0].isdecimal():
        return False
    if holder[1] != socket.gethostname():
        return True  # nobody can tell from here
    if died:
        return False
    try:
        os.kill(int(holder[0]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(holder[0]) != os.getpid()
