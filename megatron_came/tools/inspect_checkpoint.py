"""``megatron-came inspect CHECKPOINT``: what a checkpoint of Megatron holds."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.state import FACTORS


class CheckpointError(Exception):
    """There is no checkpoint to read; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint.

    Attributes:
        name: its name there.
        kind: weights, main weights, momentum, factors or other.
        tensor: its whole value.
    """

    name: str
    kind: str
    tensor: Tensor

    def line(self) -> str:
        """Name, shape, dtype, least and greatest value, and the number of NaNs."""
        tensor = self.tensor
        values = tensor[~tensor.isnan()] if tensor.is_floating_point() else tensor
        extremes = "empty"
        if ".bucket_idx_" in self.name:
            extremes = "a bucket, whose padding is arbitrary"
        elif values.numel():
            extremes = f"{float(values.min()):.3g} .. {float(values.max()):.3g}"
        nans = tensor.numel() - values.numel()
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{self.name}  {shape} {dtype}  {extremes}  {nans} NaN"


def kind_of(name: str) -> str:
    """Tell what a tensor is from its name in a checkpoint."""
    words = name.split(".")
    if any(word in FACTORS for word in words):
        return "factors"
    if "exp_avg" in words:
        return "momentum"
    if "optimizer" in words or "optimizer_state" in words:
        return "main weights" if "param" in words or "fp32_param" in words else "other"
    return "weights"


def find(path: Path) -> Path:
    """Return the folder of one iteration: ``path`` itself, or the latest below it.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name a checkpoint's.")
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        written = tracker.read_text().strip()
        path = path / ("release" if written == "release" else f"iter_{int(written):07d}")
    if (path / ".metadata").exists() or any(path.glob("mp_rank_*")):
        return path
    raise CheckpointError(
        f"{path} holds no checkpoint of Megatron: neither .metadata (torch_dist) nor mp_rank_* "
        "(torch) is in it."
    )


def read(folder: Path) -> tuple[dict[str, Any], Iterator[Entry]]:
    """Read what is not a tensor, and the tensors one after the other.

    Args:
        folder: of one iteration.
    """
    if (folder / ".metadata").exists():
        return _distributed(folder)
    files = sorted(folder.glob("mp_rank_*/*.pt"))
    model = next((file for file in files if file.name != "distrib_optim.pt"), None)
    if model is None:
        raise CheckpointError(f"{folder} holds no model file: name another checkpoint.")
    return _load(model), _legacy(files)


def _load(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Megatron's modules, which the file refers to
        return torch.load(file, map_location="cpu", weights_only=False)


def _distributed(folder: Path) -> tuple[dict[str, Any], Iterator[Entry]]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata

    def value(name: str, placeholder: Any) -> Any:
        state = {name: placeholder}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it loads in one process, as asked
            load(state, checkpoint_id=folder, no_dist=True)
        return state[name]

    def tensors() -> Iterator[Entry]:
        for name, entry in sorted(metadata.items()):
            if isinstance(entry, TensorStorageMetadata):
                tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
                yield Entry(name, kind_of(name), value(name, tensor))

    common: dict[str, Any] = {}
    for name in metadata:
        if name.startswith("common_state/"):
            (common,) = value(name, io.BytesIO())
    if (folder / "common.pt").exists():  # before megatron-core 0.19
        common = _load(folder / "common.pt")
    return common, tensors()


def _legacy(files: list[Path]) -> Iterator[Entry]:
    for file in files:
        state = _load(file)
        root = "optimizer" if file.name == "distrib_optim.pt" else ""
        for name, tensor in _tensors(root, state):
            yield Entry(f"{file.parent.name}.{name}", kind_of(name), tensor)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _tensors(f"{name}.{key}".lstrip("."), inner)


def report(folder: Path, *, details: bool) -> Iterator[str]:
    """Describe the checkpoint of one iteration, line by line."""
    common, entries = read(folder)
    args = common.get("args")
    yield f"checkpoint  {folder}"
    yield f"iteration   {common.get('iteration', 'unknown')}"
    yield f"optimizer   {getattr(args, 'optimizer', 'unknown')}"
    count: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    nans: dict[str, int] = defaultdict(int)
    lines = []
    for entry in entries:
        tensor = entry.tensor
        count[entry.kind] += 1
        size[entry.kind] += tensor.numel() * tensor.element_size()
        nans[entry.kind] += int(tensor.isnan().sum()) if tensor.is_floating_point() else 0
        if details:
            lines.append(f"  {entry.line()}")
    yield ""
    for kind in ("weights", "main weights", "momentum", "factors", "other"):
        if count[kind]:
            mebibytes = size[kind] / 2**20
            yield f"{kind:<13}{count[kind]:>6} tensors {mebibytes:>12.2f} MiB {nans[kind]:>6} NaN"
    if lines:
        yield ""
        yield from lines


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-came inspect", description="List what a checkpoint of Megatron holds."
    )
    parser.add_argument("checkpoint", type=Path, help="folder of --save, or of one iteration in it")
    parser.add_argument("--summary", action="store_true", help="leave out the single tensors")
    options = parser.parse_args(argv)
    try:
        for line in report(find(options.checkpoint), details=not options.summary):
            print(line)
    except CheckpointError as error:
        print(f"megatron-came inspect: {error}", file=sys.stderr)
        return 2
    except (Exception, CheckpointException) as error:
        print(
            f"megatron-came inspect: {options.checkpoint} cannot be read ({type(error).__name__}): "
            "it may be truncated; inspect an earlier iteration's folder.",
            file=sys.stderr,
        )
        return 2
    return 0
