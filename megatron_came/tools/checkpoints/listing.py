"""The lines of ``megatron-came inspect``."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator

from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.stored import Stored
from megatron_came.terminal.progress import Progress
from megatron_came.tools.checkpoints.kinds import KINDS, has_padding, kind_of
from megatron_came.tools.checkpoints.values import Values

# Less is read within two seconds from any disk.
_LONG = 256 << 20


def progress(label: str, amount: int) -> Progress:
    """Show how far the reading of so many bytes is, on standard error, if it takes long."""
    return Progress(label, amount, sys.stderr) if amount > _LONG else _Silent(label, amount)


class _Silent(Progress):
    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, amount: float, note: str = "") -> None:
        pass


def bytes_of(tensor: Stored) -> int:
    """Bytes of its elements in files."""
    return tensor.stored_numel * tensor.dtype.itemsize


def head(checkpoint: Checkpoint) -> Iterator[str]:
    """Say what the whole is."""
    yield f"checkpoint  {checkpoint.folder.path}"
    yield f"iteration   {_word(checkpoint.common.get('iteration'))}"
    yield f"optimizer   {_word(checkpoint.args.get('optimizer'))}"


def report(checkpoint: Checkpoint, *, details: bool) -> Iterator[str]:
    """Describe a checkpoint, line by line.

    Raises:
        CheckpointError: some of it cannot be read.
    """
    for item in checkpoint.objects.values():  # a foreign class in any of them is to be named
        item.load()
    yield from head(checkpoint)
    count: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    nans: dict[str, int] = defaultdict(int)
    lines = []
    total = sum(map(bytes_of, checkpoint.tensors))
    with progress("Reading", total) as bar:
        for tensor in checkpoint.tensors:
            values, kind = Values.of(tensor), kind_of(tensor.name)
            count[kind] += 1
            size[kind] += bytes_of(tensor)
            nans[kind] += values.nans
            if details:
                lines.append(f"  {_line(tensor, values)}")
            bar.advance(bytes_of(tensor))
    yield ""
    for kind in KINDS:
        if count[kind]:
            mebibytes = size[kind] / 2**20
            yield f"{kind:<13}{count[kind]:>6} tensors {mebibytes:>12.2f} MiB {nans[kind]:>6} NaN"
    if lines:
        yield ""
        yield from lines


def _line(tensor: Stored, values: Values) -> str:
    """Name, shape, dtype, least and greatest value, and the number of NaNs."""
    extremes = "empty"
    if has_padding(tensor.name):
        extremes = "a bucket, whose padding is arbitrary"
    elif values.seen:
        extremes = f"{values.least:.3g} .. {values.greatest:.3g}"
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{printable(tensor.name)}  {shape} {dtype}  {extremes}  {values.nans} NaN"


def printable(text: str) -> str:
    """What stands in a file, without anything that a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _word(value: object) -> str:
    """A number or name that stands in a file; anything else is unknown."""
    return printable(str(value))[:60] if isinstance(value, int | str) else "unknown"
