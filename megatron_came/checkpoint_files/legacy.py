"""Checkpoints of ``--ckpt-format torch``: files of ``torch.save``, for each model-parallel rank."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_came.checkpoint_files.archives import Archive
from megatron_came.checkpoint_files.errors import cannot_be_read
from megatron_came.checkpoint_files.stored import CheckpointTensor, Chunk, Item
from megatron_came.checkpoint_files.tensors import StoredTensor
from megatron_came.core.digests import MAIN_WEIGHTS, WEIGHTS
from megatron_came.core.digests import MOMENTUM as MOMENTUM_KIND
from megatron_came.core.momentum import MOMENTUM
from megatron_came.core.state import FACTORS

OPTIMIZER_FILE = "distrib_optim.pt"
# More than Megatron nests.
_DEPTH = 100


def tensors_of(path: Path, archive: Archive, state: Any) -> Iterator[CheckpointTensor]:
    """List the tensors in what was loaded of a file, which stays open; each container once.

    Raises:
        CheckpointError: it is deeper than any of Megatron's.
    """
    # The file has no key above all; the model's has.
    root = ("optimizer",) if path.name == OPTIMIZER_FILE else ()
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any]] = [(root, state)]
    while waiting:
        keys, value = waiting.pop()
        if len(keys) > _DEPTH:
            raise cannot_be_read(path, "things in it are nested without end")
        if isinstance(value, StoredTensor):
            name = ".".join([path.parent.name, *map(str, keys)])
            kind, is_flat = _meaning([str(key) for key in keys])
            chunk = Chunk((0,) * len(value.shape), value.shape, Item(path), (archive, value))
            key = "" if is_flat else name
            yield CheckpointTensor(name, value.shape, value.dtype, (chunk,), kind, key)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            waiting += [((*keys, key), inner) for key, inner in reversed(items)]


def _meaning(keys: list[str]) -> tuple[str | None, bool]:
    """Kind of a tensor, and whether it is a flat buffer, from where it stands in the file."""
    if keys and re.fullmatch(r"model\d*", keys[0]):
        return WEIGHTS, False
    if keys and keys[-1] in FACTORS:
        return keys[-1], False
    if "fp32_from_fp16_params" in keys:  # Megatron's key, of bf16 too
        return MAIN_WEIGHTS, False
    if keys and keys[-1] in (MOMENTUM, "param"):
        # PyTorch's optimizers have "state" by parameter, the distributed one gathers buffers.
        return MOMENTUM_KIND if keys[-1] == MOMENTUM else MAIN_WEIGHTS, "state" not in keys
    return None, False


def flat_parameters(state: Any) -> Iterator[tuple[str, StoredTensor, range]]:
    """Say where parameters lie in the flat buffers of a file of the distributed optimizer.

    Yields:
        Main weights' or momentum's kind, its buffer, and the elements of a parameter in it.
    """
    try:
        for optimizer in state if isinstance(state, list) else [state]:
            for index, spans in enumerate(optimizer["came"]["spans"]):
                (buffers,) = optimizer[index].values()  # a buffer has one dtype
                for kind, key in ((MAIN_WEIGHTS, "param"), (MOMENTUM_KIND, MOMENTUM)):
                    for start, stop in spans:
                        if not 0 <= start <= stop <= buffers[key].numel:
                            raise ValueError("a parameter lies outside of its buffer")
                        yield kind, buffers[key], range(start, stop)
    except (AttributeError, KeyError, TypeError, ValueError):
        return  # saved by another optimizer or release, or damaged
