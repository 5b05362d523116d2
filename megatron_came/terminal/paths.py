"""Paths on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def named_path(value: str) -> Path:
    """Read an argument that names a file or folder.

    Raises:
        argparse.ArgumentTypeError: it is empty, as a variable is that was never set; as a path it
            would be the current folder.
    """
    if not value:
        raise argparse.ArgumentTypeError("'' names no file or folder: give one, such as . for here")
    return Path(value)
