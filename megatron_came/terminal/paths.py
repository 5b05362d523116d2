"""Paths on the command line, and files that are written there."""

import argparse
import contextlib
import os
import shutil
from pathlib import Path

from megatron_came.terminal.interrupts import half_made


def named_path(value: str) -> Path:
    """Read an argument that names a file or folder.

    Raises:
        argparse.ArgumentTypeError: it is empty, as a variable is that was never set; as a path it
            would be the current folder.
    """
    if not value:
        raise argparse.ArgumentTypeError("'' names no file or folder: give one, such as . for here")
    return Path(value)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or, whatever interrupts it, as it was before.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # a device or a pipe has no other name to take
        path.write_bytes(content)
        return
    path = path.resolve()  # what a link leads to; the link stays
    partial = path.with_name(f"{path.name}.partial")
    half_made.add(partial)
    try:
        partial.write_bytes(content)
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
        half_made.discard(partial)
