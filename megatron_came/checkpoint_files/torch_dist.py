"""Checkpoints of ``--ckpt-format torch_dist``: what ``torch.distributed.checkpoint`` writes.

Those of ``fsdp_dtensor`` are such, too, but have each entry of the common state by itself.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_came.checkpoint_files import pickles
from megatron_came.checkpoint_files.archives import open_regular
from megatron_came.checkpoint_files.errors import (
    CheckpointError,
    cannot_be_read,
    printable,
    shown,
)
from megatron_came.checkpoint_files.names import StandIn
from megatron_came.checkpoint_files.stored import CheckpointTensor, Chunk, Item, Shape
from megatron_came.checkpoint_files.tensors import MOST_DIMENSIONS, is_size
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS, split_name
from megatron_came.core.state import FACTORS

METADATA, _COMMON = ".metadata", "common.pt"
# What weights' names begin with in fsdp_dtensor.
MODEL = "model.module."
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)", re.DOTALL)
# Of a grid of parts, the place of one and the size.
_PART = re.compile(r"(.+)/shard_[0-9.]+_([0-9]{1,9}(?:\.[0-9]{1,9}){0,7})", re.DOTALL)
_BUCKET = re.compile(r"(.*\.bucket_idx_\d+)\.(param|exp_avg)", re.DOTALL)
# The distributed optimizer's name of main weights, and that of wrappers of whole tensors.
_KINDS = {"param": MAIN_WEIGHTS, "fp32_param": MAIN_WEIGHTS, "exp_avg": MOMENTUM}
_KINDS |= {key: key for key in FACTORS}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors lie, and other things, by name."""

    tensors: dict[str, CheckpointTensor]
    objects: dict[str, Item]

    @property
    def common(self) -> Item | None:
        """The common state: in a file of its own before megatron-core 0.19."""
        names = (name for name in self.objects if name.startswith((_COMMON, "common_state/")))
        return self.objects.get(next(names, ""))

    def gaps(self) -> Iterator[str]:
        """Say of which things, that Megatron writes in parts, some parts are not named."""
        found = filter(None, map(_PART.fullmatch, self.objects))
        parts = Counter((each[1], each[2]) for each in found)
        for (name, grid), count in parts.items():
            if count != (whole := math.prod(map(int, grid.split(".")))):
                yield f"{METADATA} names {count} of the {whole} parts of {printable(name[:200])}"

    def entries(self) -> dict[str, Any]:
        """Read the common state of ``fsdp_dtensor``, but for tensors; lists by their numbers.

        Raises:
            CheckpointError: it cannot be read.
        """
        found: dict[str, Any] = {}
        try:
            for name, item in self.objects.items():
                *path, last = name.split(".")
                place = found
                for step in path:
                    place = place.setdefault(step, {})
                place[last] = item.load()
            optimizer = found.get("optimizer", {})
            if groups := optimizer.get("param_groups"):
                optimizer["param_groups"] = [groups[key] for key in sorted(groups, key=int)]
        except (AttributeError, TypeError, ValueError) as error:
            file = self.objects[name].file
            raise cannot_be_read(
                file.with_name(METADATA), f"its names contradict: {name}"
            ) from error
        return found


def is_fsdp(objects: Mapping[str, Item]) -> bool:
    """Whether such things other than tensors are those of ``--ckpt-format fsdp_dtensor``."""
    return "args" in objects  # torch_dist has them within its common state


def read_layout(folder: Path, *, quick: bool = False) -> Layout:
    """Read ``.metadata``; ``quick`` as :func:`.pickles.load` has it.

    Raises:
        CheckpointError: it is gone, truncated, or no metadata.
    """
    path = folder / METADATA
    with open_regular(path) as file:
        data = file.read()
    metadata = pickles.load(data, str(path), quick=quick)
    if not data.endswith(b"."):  # as pickles end, which a run looks at, too
        raise cannot_be_read(path, "something follows its end")
    try:
        return _layout(folder, metadata)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise cannot_be_read(path, f"{type(error).__name__}: {error}") from error


def _layout(folder: Path, metadata: Any) -> Layout:
    if not isinstance(metadata, StandIn) or not metadata.kind.endswith(".Metadata"):
        raise ValueError("it holds no Metadata")
    items: dict[tuple[str, Shape | None], Item] = {}
    for index, info in metadata.get("storage_data", {}).items():
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{folder / METADATA} says that files were transformed (compressed, say), which "
                "Megatron never does: save the checkpoint without that."
            )
        offset = index.get("offset")
        bounds = _numbers([info.get("offset"), info.get("length")])
        # Tensors go by name and offset, objects by name alone.
        key = (str(index.get("fqn")), None if offset is None else _numbers(offset))
        items[key] = Item(_inside(folder, info.get("relative_path")), *bounds)
    tensors, objects = {}, {}
    saved = metadata.get("state_dict_metadata", {})
    if (folder / _COMMON).exists():
        objects[_COMMON] = Item(folder / _COMMON)
    for name, entry in saved.items():
        if not isinstance(name, str):
            raise ValueError("a name in it is no string")
        if entry.kind.endswith(".TensorStorageMetadata"):
            tensors[name] = _tensor(name, entry, items, has_prefix=is_fsdp(saved))
        elif (name, None) not in items:
            raise ValueError(f"no file is named for {name}")
        else:
            objects[name] = items[name, None]
    return Layout(tensors, objects)


def _tensor(
    name: str, entry: StandIn, items: dict[tuple[str, Shape | None], Item], *, has_prefix: bool
) -> CheckpointTensor:
    dtype, shape = entry.get("properties").get("state")[0], _numbers(entry.get("size"))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no dtype")
    kind, key, is_bucket = kind_and_key(name, has_prefix)
    # Of a layer whose factors stand alone; in the file it has an axis of size 1 for each index.
    key, axes = split_name(key) if kind in FACTORS else (key, ())
    if len(axes) > len(shape):
        raise ValueError(f"{name} has {len(axes)} indices and {len(shape)} dimensions")
    chunks = []
    for each in entry.get("chunks"):
        offsets, sizes = _numbers(each.get("offsets")), _numbers(each.get("sizes"))
        bounds = zip(offsets, sizes, shape, strict=True)
        if not all(offset + size <= bound for offset, size, bound in bounds):
            raise ValueError(f"a chunk of {name} lies outside of it")
        if (name, offsets) not in items:
            raise ValueError(f"no file is named for a chunk of {name}")
        place = (*axes, *offsets[len(axes) :])
        chunks.append(Chunk(place, sizes, items[name, offsets]))
    return CheckpointTensor(name, shape, dtype, tuple(chunks), kind, key, is_bucket)


def kind_and_key(name: str, has_prefix: bool = False) -> tuple[str | None, str, bool]:
    """Kind and key of a tensor, and whether it is a bucket, from its name.

    Args:
        name: of the tensor.
        has_prefix: whether names of weights, and of them alone, begin with that of the model.
    """
    if bucket := _BUCKET.fullmatch(name):
        return _KINDS[bucket[2]], bucket[1], True
    if state := _STATE.fullmatch(name):
        return _KINDS.get(state[1]), state[2], False
    if has_prefix:
        key = name.removeprefix(MODEL)
        return None if key == name else WEIGHTS, key, False
    # All that is no optimizer's is the model's.
    return None if name.startswith(("optimizer.", "chained_")) else WEIGHTS, name, False


def _numbers(values: Any) -> Shape:
    numbers = tuple(values)
    if len(numbers) > MOST_DIMENSIONS:
        raise ValueError(f"it has a shape of {len(numbers)} dimensions")
    if not all(map(is_size, numbers)):
        raise ValueError(f"{shown(numbers)} are no sizes")
    return numbers


def _inside(folder: Path, name: Any) -> Path:
    """The path of a file in the folder; none of another folder is opened."""
    path = PurePosixPath(name)
    is_odd = len(name) > 255 or not name.isprintable()  # longer than file systems take
    if path.is_absolute() or ".." in path.parts or not path.parts or is_odd:
        raise ValueError(f"it names a file outside of the folder, {shown(name)}")
    return folder / path
