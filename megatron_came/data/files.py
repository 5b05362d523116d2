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
    if readers ask for the last of them: it is removed first and appears last.
    """
    temporary = tuple(path.with_name(f"{path.name}.partial") for path in paths)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        paths[-1].unlink(missing_ok=True)
        for made, path in zip(temporary, paths, strict=True):
            os.replace(made, path)
    finally:
        for made in temporary:
            made.unlink(missing_ok=True)
