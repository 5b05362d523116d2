"""Files that appear when they are whole, and that one process writes at a time."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_came.terminal.children import signals_held_back
from megatron_came.terminal.interrupts import half_made
from megatron_came.terminal.sentences import CommandError

# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class LateInterrupt(KeyboardInterrupt):
    """Ctrl-C, or its like, when everything was written already."""


@contextmanager
def whole_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each of ``paths`` and rename them, in order, at the end.

    Whatever interrupts the body, Ctrl-C included, the temporary files are removed and what stood
    under ``paths`` before stays as it was. Several files that belong together are as good as one
    if readers ask for the later ones: of the old files, all but the first are removed before any
    new one appears. No other process can write any of them meanwhile.

    Raises:
        CommandError: If another process is writing one of them.
        LateInterrupt: If a signal came while the files got their names.
        OSError: If a file cannot be made, its folder included, or the disk is full.
    """
    temporary = tuple(map(_partial, paths))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    whole = False
    try:
        with ExitStack() as stack:
            for path in sorted(paths):  # in this order everywhere: one of two processes gets all
                stack.enter_context(locked(path))
            try:
                half_made.update(temporary)
                for made in temporary:
                    made.write_bytes(b"")  # a folder that takes no files is found before the work
                yield temporary
                for made in temporary:
                    with made.open("rb+") as file:  # some file systems say only now that they
                        os.fsync(file.fileno())  # are full
                with signals_held_back():
                    _give_names(temporary, paths)
                    whole = True
            finally:
                with signals_held_back():
                    for made in temporary:
                        made.unlink(missing_ok=True)
                    half_made.difference_update(temporary)
    except KeyboardInterrupt as interrupt:
        # One that another thread took may arrive when signals are no longer held back.
        raise (LateInterrupt() if whole else interrupt) from None


def clear_away(paths: Iterable[Path]) -> None:
    """Take away what a process that was killed while it wrote such files has left beside them."""
    for path in paths:
        if _partial(path).exists() or lock_of(path).exists():
            # Another process is writing it, or here nothing can be changed.
            with suppress(CommandError, OSError), locked(path):
                _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _give_names(temporary: tuple[Path, ...], paths: tuple[Path, ...]) -> None:
    for path in reversed(paths[1:]):
        path.unlink(missing_ok=True)
    for made, path in zip(temporary, paths, strict=True):
        os.replace(made, path)


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
