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


def lock_of(path: Path) -> Path:
    """Name the lock of a file."""
    return path.with_name(f".{path.name}.lock")


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
    lock = lock_of(path)
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
            pid, machine = holder[:2] if len(holder) > 1 else ("unknown", "unknown")
            raise CommandError(
                f"{path} is being written by process {pid} on {machine}: wait until it ends, or"
                f" give another name; if there is no such process, remove {lock}."
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()} {_boot()}\n".encode(), 0)
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
    """Whether who is named in a lock may be writing; not if it ``died``, as locks here tell.

    Args:
        holder: its process, machine and the start of that machine. Containers have names of their
            own, another one each time, and one such start.
        died: whether the lock was free; of another machine that may mean nothing.
    """
    if len(holder) < 2 or not holder[0].isdecimal():
        return False
    is_here = holder[1] == socket.gethostname()
    if died and (is_here or holder[2:] == [_boot()]):
        return False
    if not is_here:
        return True  # nobody can tell from here
    try:
        os.kill(int(holder[0]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(holder[0]) != os.getpid()


def _boot() -> str:
    """What tells this start of the machine from others; empty where the system does not say it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
