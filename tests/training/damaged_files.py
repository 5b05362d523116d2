"""Damages checkpoints on disk, tensor by tensor, with metadata that agree."""

import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_came.core.records import KEY


def flip(tensor: torch.Tensor, element: int = 5, bit: int = 3) -> torch.Tensor:
    """Flip one bit, by default one of the last of an element."""
    changed = tensor.clone().contiguous()
    flat = changed.view(-1)
    width = flat.element_size()
    memory = flat.view(torch.uint8)
    memory[(element % flat.numel()) * width + bit // 8] ^= 1 << bit % 8
    return changed


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """Swap the first and the second half of the elements."""
    flat = tensor.reshape(-1)
    return flat.roll(flat.numel() // 2).view(tensor.shape)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """Make one element NaN."""
    changed = tensor.clone()
    changed.view(-1)[-1] = torch.nan
    return changed


def distributed(
    folder: Path, which: Callable[[str], bool], change: Callable[[Any], Any] = flip
) -> str:
    """Change the first tensor (or the common state) whose name fits, in format ``torch_dist``.

    Returns:
        The name of the file that holds it.
    """
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in sorted(metadata.storage_data.items(), key=lambda item: str(item[0])):
        if not which(index.fqn):
            continue
        file = folder / info.relative_path
        content = file.read_bytes()
        blob = content[info.offset : info.offset + info.length]
        before = torch.load(io.BytesIO(blob), weights_only=False)
        after = change(before)
        buffer = io.BytesIO()
        torch.save(after, buffer)
        file.write_bytes(content + buffer.getvalue())
        metadata.storage_data[index] = replace(
            info, offset=len(content), length=len(buffer.getvalue())
        )
        if isinstance(after, torch.Tensor):
            entry = metadata.state_dict_metadata[index.fqn]
            entry.properties.dtype = after.dtype
            if len(entry.chunks) == 1 and after.shape != before.shape:
                entry.size = after.shape
                entry.chunks[0] = replace(entry.chunks[0], sizes=after.shape)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        return info.relative_path
    raise AssertionError(f"nothing to damage in {folder}: {sorted(metadata.state_dict_metadata)}")


def legacy(file: Path, change: Callable[[Any], None]) -> str:
    """Change in place what a file of format ``torch`` holds."""
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    return file.name


def common(folder: Path, change: Callable[[dict], None]) -> None:
    """Change in place what is not a tensor."""

    def changed(states):
        for state in states:
            change(state)
        return states

    distributed(folder, lambda name: name.startswith("common_state/"), changed)


def in_pickle(file: Path, word: bytes = b"consumed_train_samples") -> str:
    """Flip a bit of a word in a file, as a disk does: what has checksums keeps them."""
    content = bytearray(file.read_bytes())
    content[content.index(word)] ^= 1
    file.write_bytes(content)
    return file.name


def in_common(folder: Path) -> str:
    """Flip a bit of the common state's pickle, in format ``torch_dist``."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    places = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
    return in_pickle(folder / next(places[n] for n in places if n.startswith("common_state/")))


def swapped(folder: Path) -> str:
    """Swap two files of format ``torch_dist``."""
    one, other = folder / "__0_0.distcp", folder / "__1_0.distcp"
    content = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(content)
    return one.name


def forget_digests(state: dict) -> None:
    """As if an earlier version had saved it."""
    del state[KEY]


def copy(folder: Path, to: Path) -> Path:
    """Copy a checkpoint; returns the folder of its only iteration, or its last."""
    shutil.copytree(folder, to)
    return max(to.glob("iter_*"))
