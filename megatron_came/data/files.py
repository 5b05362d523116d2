"""Files that appear under their name only when they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yields a temporary path for each of ``paths`` and renames them, in order, at the end.

    Whatever interrupts the body, Ctrl-C included, the temporary files are removed and what stood
    under ``paths`` before stays as it was. Several files that belong together are as good as one
    if readers ask for the later ones: of the old files, all but the first are removed before any
    new one appears.

    Raises:
        OSError: If a file cannot be made, its folder included, or the disk is full.
    """
    temporary = tuple(path.with_name(f"{path.name}.partial") for path in paths)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for made in temporary:
            made.write_bytes(
                b""
            )  # a folder that takes no files is found before the work, not after
        yield temporary
        for made in temporary:
            _to_disk(made)
        for path in reversed(paths[1:]):
            path.unlink(missing_ok=True)
        for made, path in zip(temporary, paths, strict=True):
            os.replace(made, path)
    finally:
        for made in temporary:
            made.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Waits until a file is on the disk: some file systems say only then that they are full."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
