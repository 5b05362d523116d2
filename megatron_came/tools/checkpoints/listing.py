"""The lines of ``megatron-came inspect``."""

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_came.checkpoint_files.errors import printable, shown
from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.stored import CheckpointTensor
from megatron_came.core.state import FACTORS
from megatron_came.terminal.progress import Progress

_KINDS = ("weights", "main weights", "momentum", "factors", "other")
# Less is read within two seconds from any disk.
_LONG = 256 << 20


@contextlib.contextmanager
def progress(label: str, amount: int) -> Iterator[Callable[[int], None]]:
    """Show how far the reading of so many bytes is, on standard error, if it takes long.

    Yields:
        What is told of every number of bytes that has been read.
    """
    if amount <= _LONG:
        yield lambda _: None
        return
    with Progress(label, amount, sys.stderr) as bar:
        yield bar.advance


@dataclass(slots=True)
class Values:
    """What was seen of a tensor's elements; ``seen``, ``least`` and ``greatest`` are of numbers."""

    seen: int = 0
    nans: int = 0
    infinities: int = 0
    negatives: int = 0
    least: float = float("inf")
    greatest: float = float("-inf")

    def add(self, values: Tensor) -> None:
        """Look at some more elements."""
        if values.is_complex():
            values = torch.view_as_real(values)
        if values.dtype.itemsize < 4:  # aminmax knows neither bool nor 8-bit floats
            values = values.float() if values.is_floating_point() else values.int()
        if values.is_floating_point():
            is_nan = values.isnan()
            if is_nan.any():
                self.nans += int(is_nan.sum())
                values = values[~is_nan]
            self.infinities += int(values.isinf().sum())
        if values.numel():
            least, greatest = map(float, values.aminmax())
            self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
            self.negatives += int((values < 0).sum()) if least < 0 else 0
            self.seen += values.numel()


def head(checkpoint: Checkpoint) -> Iterator[str]:
    """Say what the whole is."""
    yield f"checkpoint  {checkpoint.folder.path}"
    yield f"iteration   {word(checkpoint.common.get('iteration'))}"
    yield f"optimizer   {word(checkpoint.args.get('optimizer'))}"


def report(checkpoint: Checkpoint, *, details: bool) -> Iterator[str]:
    """Describe a checkpoint, line by line.

    Raises:
        CheckpointError: some of it cannot be read.
    """
    for item in checkpoint.objects.values():  # a foreign class in any of them is to be named first
        item.load()
    yield from head(checkpoint)
    count: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    nans: dict[str, int] = defaultdict(int)
    lines = []
    total = sum(tensor.stored_bytes for tensor in checkpoint.tensors)
    with progress("Reading", total) as advance:
        for tensor in checkpoint.tensors:
            values = Values()
            for box in tensor.boxes():
                values.add(box.values)
            kind = "factors" if tensor.kind in FACTORS else tensor.kind or "other"
            count[kind] += 1
            size[kind] += tensor.stored_bytes
            nans[kind] += values.nans
            lines.append(f"  {_line(tensor, values)}")
            advance(tensor.stored_bytes)
    yield ""
    for kind in _KINDS:
        if count[kind]:
            mebibytes = size[kind] / 2**20
            yield f"{kind:<13}{count[kind]:>6} tensors {mebibytes:>12.2f} MiB {nans[kind]:>6} NaN"
    if lines and details:
        yield ""
        yield from lines


def _line(tensor: CheckpointTensor, values: Values) -> str:
    """Name, shape, dtype, least and greatest value, and the number of NaNs."""
    extremes = "empty"
    if tensor.is_bucket:
        extremes = "a bucket, whose padding is arbitrary"
    elif values.seen:
        extremes = f"{values.least:.3g} .. {values.greatest:.3g}"
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    name = printable(tensor.name)
    return f"{name}  {shape} {tensor.dtype_name}  {extremes}  {values.nans} NaN"


def word(value: object) -> str:
    """A number or name that stands in a file; anything else is unknown."""
    if isinstance(value, str):
        return printable(value[:60])
    return shown(value) if isinstance(value, int) else "unknown"
