"""Which files of a checkpoint hold a tensor, and whether its metadata fits its digests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_came.checkpoint_files.torch_dist import Chunk, DistributedTensor, read_layout
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS, Record, split_name
from megatron_came.core.state import FACTORS

_STATE = r"(chained_\d+\.)?optimizer\.state\."
_KEYS = {MAIN_WEIGHTS: "(param|fp32_param)", MOMENTUM: "exp_avg"}


Tensors = Mapping[str, DistributedTensor]


def tensors_of(folder: str) -> Tensors:
    """Return what a distributed checkpoint says of its tensors; nothing, of files of one rank each.

    Raises:
        CheckpointError: it cannot be read, or names what Megatron does not write.
    """
    return read_layout(Path(folder)).tensors if Path(folder).is_dir() else {}


def holding(tensors: Tensors, record: Record | None, kind: str, name: str) -> set[str]:
    """Return the files of a distributed checkpoint that hold a tensor."""
    key, axes = split_name(name)
    pattern = re.compile(_pattern(kind, key))
    buckets = [] if record is None else _buckets(record, kind, name)
    return {
        chunk.item.file.name
        for fqn, tensor in tensors.items()
        if fqn in buckets or pattern.fullmatch(fqn)
        for chunk in tensor.chunks
        if fqn in buckets or _holds(chunk, axes)
    }


def _holds(chunk: Chunk, axes: tuple[int, ...]) -> bool:
    """Whether a chunk has what stands at these indices of its first axes."""
    return all(
        start <= index < start + size
        for index, start, size in zip(axes, chunk.offsets, chunk.sizes, strict=False)
    )


def legacy(kind: str, models: Sequence[str]) -> set[str]:
    """Return the files of format ``torch`` that hold a tensor, given the ranks' model files."""
    found = set()
    for model in map(Path, models):
        beside = model.with_name("distrib_optim.pt")
        file = beside if kind != WEIGHTS and beside.exists() else model
        found.add(f"{file.parent.name}/{file.name}")
    return found


def unlike(tensors: Tensors, record: Record | None, *, with_optimizer: bool) -> str | None:
    """Say which tensor of a distributed checkpoint has another shape or dtype than it should.

    Args:
        tensors: of the checkpoint.
        record: of its digests.
        with_optimizer: look at CAME's state, too, which is going to be loaded.
    """
    for key, tensor in tensors.items() if with_optimizer else ():
        state = re.match(rf"{_STATE}({'|'.join((*FACTORS, 'exp_avg'))})\.", key)
        is_half = state and state[2] == "exp_avg" and tensor.dtype == torch.bfloat16
        if state and tensor.dtype != torch.float32 and not is_half:
            return f"{key} is in {_name(tensor.dtype)}, and CAME keeps it in float32"
    if record is None or not tensors:
        return None
    found = _by_kind(tensors)
    problems = (
        _unlike(found, record, kind, name)
        for kind, named in record.tensors.items()
        for name in named
        if with_optimizer or kind == WEIGHTS
    )
    return next(filter(None, problems), None)


def _by_kind(tensors: Tensors) -> dict[tuple[str, str], DistributedTensor]:
    """Find tensors by kind, as digests call it, and key."""
    found = {(WEIGHTS, key): tensor for key, tensor in tensors.items()}
    kinds = {"param": MAIN_WEIGHTS, "fp32_param": MAIN_WEIGHTS, "exp_avg": MOMENTUM}
    kinds |= {key: key for key in FACTORS}
    for key, tensor in tensors.items():
        state = re.match(rf"{_STATE}(\w+)\.", key)
        if state and state[2] in kinds:
            found[kinds[state[2]], key[state.end() :]] = tensor
    return found


def _unlike(
    found: Mapping[tuple[str, str], DistributedTensor], record: Record, kind: str, name: str
) -> str | None:
    saved, (key, axes) = record.tensors[kind][name], split_name(name)
    if _buckets(record, kind, name):
        return None
    tensor = found.get((kind, key))
    if tensor is None:
        return f"{kind} of {name} is not in it"
    shape = tensor.shape[len(axes) :]
    if shape != saved.shape:
        return f"{tensor.name} has shape {shape}, and {saved.shape} was saved"
    if kind == WEIGHTS and _name(tensor.dtype) != saved.dtype:
        return f"{tensor.name} is in {_name(tensor.dtype)}, and {saved.dtype} was saved"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pattern(kind: str, key: str) -> str:
    """What a tensor is called in the files."""
    if kind == WEIGHTS:
        return re.escape(key)
    return f"{_STATE}{_KEYS.get(kind, kind)}\\.{re.escape(key)}"


def _buckets(record: Record, kind: str, name: str) -> list[str]:
    """The buckets that hold a parameter's main weights or momentum."""
    if kind not in _KEYS:
        return []
    suffix = "param" if kind == MAIN_WEIGHTS else "exp_avg"
    return [
        f"{key}.{suffix}"
        for key, inside in record.buckets.items()
        if any(name == named for one in inside for named, _ in one.boxes)
    ]
