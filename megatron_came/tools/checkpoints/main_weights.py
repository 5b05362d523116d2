"""Main weights beside the model's weights, which are these main weights in the model's dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.torch_dist import Chunk, DistributedTensor
from megatron_came.core.digests import MAIN_WEIGHTS, WEIGHTS, Record, split_name
from megatron_came.tools.checkpoints import names


class Compared(NamedTuple):
    """A part of the main weights that was compared.

    Attributes:
        name: of the tensor.
        file: that holds the main weights.
        numel: elements that were compared.
        unlike: how many are not the model's.
    """

    name: str
    file: str
    numel: int
    unlike: int


def unlike(main: Tensor, model: Tensor) -> Tensor:
    """Tell which main weights the model's weights were not made of.

    Args:
        main: fp32.
        model: of the same shape, in any dtype of weights.
    """
    if model.dtype != torch.bfloat16:
        cast = main.to(model.dtype)
        return (cast != model) & ~(cast.isnan() & model.isnan())
    # Halfway between two, ranks may hold either until the first step has gathered the weights.
    bits = main.contiguous().view(torch.int32)
    lower = (bits >> 16).to(torch.int16)
    rounded = main.to(torch.bfloat16).view(torch.int16)
    found = model.contiguous().view(torch.int16)
    halfway = (bits & 0xFFFF) == 0x8000
    near = (found == rounded) | (halfway & ((found == lower) | (found == lower + 1)))
    return ~near & ~(main.isnan() & model.isnan())


def pairs(checkpoint: Checkpoint) -> Iterator[tuple[DistributedTensor, DistributedTensor]]:
    """Main weights by name, and the model's weights that belong to them."""
    stored = [each for each in checkpoint.tensors if isinstance(each, DistributedTensor)]
    models = {each.name: each for each in stored}
    for tensor in stored:
        known = names.named(tensor.name)
        if known and known[0] == MAIN_WEIGHTS and known[1] in models:
            yield tensor, models[known[1]]


def compare(checkpoint: Checkpoint, record: Record | None) -> Iterator[Compared]:
    """Compare all main weights whose model weights are known.

    Raises:
        CheckpointError: something cannot be read.
    """
    for main, model in pairs(checkpoint):
        for chunk in main.chunks:
            yield _of_chunk(main, model, chunk)
    if record is not None and record.buckets:
        yield from _of_buckets(checkpoint, record)


def _of_chunk(main: DistributedTensor, model: DistributedTensor, chunk: Chunk) -> Compared:
    wrong = 0
    with chunk.open() as archive:
        for first, values in chunk.stored(archive, main.name, main.dtype).boxes():
            offsets = chunk.offsets and (chunk.offsets[0] + first, *chunk.offsets[1:])
            wrong += int(unlike(values, model.box(offsets, tuple(values.shape))).sum())
    return Compared(main.name, chunk.item.file.name, math.prod(chunk.sizes), wrong)


def _of_buckets(checkpoint: Checkpoint, record: Record) -> Iterator[Compared]:
    stored = {each.name: each for each in checkpoint.tensors if isinstance(each, DistributedTensor)}
    for tensor in stored.values():
        known = names.bucket(tensor.name)
        if known is None or known[0] != MAIN_WEIGHTS:
            continue
        for inside in record.buckets.get(known[1], ()):
            flat = tensor.box((inside.start,), (math.prod(inside.shape),)).view(inside.shape)
            for name, box in inside.boxes:
                key, axes = split_name(name)
                if key not in stored or name not in record.tensors.get(WEIGHTS, {}):
                    continue
                place = tuple(
                    slice(at, at + size) for at, size in zip(box.place, box.size, strict=True)
                )
                offsets, sizes = (*axes, *box.offset), (*(1 for _ in axes), *box.size)
                model = stored[key].box(offsets, sizes).view(box.size)
                wrong = int(unlike(flat[place], model).sum())
                yield Compared(f"main weights of {name}", tensor.name, model.numel(), wrong)
