"""Numba's cache, damaged in every way: run in a process of its own by test_numba_cache.py.

    python -m tests.support.numba_cache_probe FOLDER

A small function is compiled as the kernels are, again and again: each time as in a new process, as
nothing that Numba holds in memory is used twice.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import config, njit, prange

from megatron_came.kernels.cpu import keeping


class Made(NamedTuple):
    """How often a function was loaded, and what was said."""

    hits: int
    note: str


def fill(numbers):  # type: ignore[no-untyped-def]
    for index in prange(4):
        numbers[index] = index / 3


def compiled() -> Made:
    """Compiles, or loads; the function must give the same whatever happened."""
    notes: list[str] = []
    keeping.warn_once = notes.append  # type: ignore[assignment]
    function: Any = keeping.keep(njit(fill))
    numbers = np.empty(4)
    function(numbers)
    assert numbers.tolist() == [0.0, 1 / 3, 2 / 3, 1.0]
    return Made(sum(function.stats.cache_hits.values()), " ".join(notes))


def is_loaded(made: Made) -> bool:
    return made == (1, "")


def variants(folder: Path) -> None:
    """What is compiled from one function in two ways is kept in two places."""
    results = [keeping.keep(njit(parallel=way)(fill), str(way)) for way in (False, True) * 2]
    for function in results:
        function(np.empty(4))
    assert [sum(function.stats.cache_hits.values()) for function in results] == [0, 0, 1, 1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\x93garbage" * 300,
    "a byte short": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "a bit flipped": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 4])
        + content[len(content) // 2 + 1 :]
    ),
}


def damage(folder: Path) -> None:
    for suffix in (".nbi", ".nbc"):
        for file in folder.rglob("*fill-*.nb[ic]"):
            file.unlink()
        first = compiled()
        assert first == (0, "")
        assert is_loaded(compiled())
        (file,) = folder.rglob(f"*fill-*{suffix}")
        for how, change in DAMAGE.items():
            file.write_bytes(change(file.read_bytes()))
            made = compiled()
            if made.note:
                assert f"in {file.parent} was damaged (" in made.note, (how, made.note)
            else:  # bytes that nobody reads
                assert how in ("a byte more", "a bit flipped"), (suffix, how)
            assert is_loaded(compiled()), (suffix, how)
        file.unlink()
        assert compiled().note == ""  # as in a new folder
        assert is_loaded(compiled())


def no_room(folder: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails in both."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for file in folder.rglob("*fill-*.nb[ic]"):
        file.unlink()
    for limit in (0, 30, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        made = compiled()
        assert "kernels are compiled in memory" in made.note, made.note
        assert "(file too large): let NUMBA_CACHE_DIR name a folder" in made.note, made.note
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert compiled().note == ""
    assert is_loaded(compiled())


def no_folder(folder: Path) -> None:
    """Neither the package's folder nor HOME can be written; root can write anywhere but here."""
    from numba.core.caching import CacheImpl, UserProvidedCacheLocator

    CacheImpl._locator_classes = [UserProvidedCacheLocator]
    (folder / "file").write_text("")
    for nonsense in ("", str(folder / "file"), str(folder / "file" / "x"), "/proc/nowhere"):
        config.CACHE_DIR = nonsense
        made = compiled()
        assert "Numba cannot keep them (no folder can be written): " in made.note, made.note
    config.CACHE_DIR = str(folder)
    config.CACHE_LOCATOR_CLASSES = "NoSuchClass"
    assert "NoSuchClass" in compiled().note
    config.CACHE_LOCATOR_CLASSES = ""
    assert is_loaded(compiled())


def at_once(folder: Path) -> None:
    """Two processes, which damage what is kept and build it again, at the same time."""
    files = list(folder.rglob("*fill-*.nb[ic]"))
    child = os.fork()
    for turn in range(4):
        for file in files:
            if turn % 2 == bool(child):
                file.write_bytes(b"" if child else b"garbage")
        compiled()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    compiled()
    assert is_loaded(compiled())


if __name__ == "__main__":
    where = Path(sys.argv[1])
    config.CACHE_DIR = str(where)
    for test in (damage, no_room, no_folder, at_once, variants):
        test(where)
    print("fine")
