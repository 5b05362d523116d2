"""Files that appear under their name only when they are whole."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_came.data.locks import lock_of, locked
from megatron_came.terminal.children import signals_held_back
from megatron_came.terminal.interrupts import half_made
from megatron_came.terminal.sentences import CommandError


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
