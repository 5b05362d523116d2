"""Main weights beside the model's weights, which are these main weights in the model's dtype."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.stored import CheckpointTensor
from megatron_came.core.digests import MAIN_WEIGHTS, WEIGHTS, split_name
from megatron_came.core.records import Record

# Name of main weights, the file they lie in, how many were compared, and how many differ.
Compared = tuple[str, str, int, int]


def unlike(main: Tensor, model: Tensor) -> Tensor:
    """Tell which fp32 main weights the model's weights, of the same shape, were not made of."""
    both_nan = main.isnan() & model.isnan()
    if model.dtype != torch.bfloat16:
        return (main.to(model.dtype) != model) & ~both_nan
    # Halfway between two, ranks may hold either until the first step has gathered the weights.
    bits = main.contiguous().view(torch.int32)
    lower = (bits >> 16).to(torch.int16)
    rounded = main.to(torch.bfloat16).view(torch.int16)
    found = model.contiguous().view(torch.int16)
    halfway = (bits & 0xFFFF) == 0x8000
    return (found != rounded) & ~(halfway & ((found == lower) | (found == lower + 1))) & ~both_nan


def _models(checkpoint: Checkpoint) -> dict[str, CheckpointTensor]:
    return {each.key: each for each in checkpoint.tensors if each.kind == WEIGHTS}


def pairs(checkpoint: Checkpoint) -> Iterator[tuple[CheckpointTensor, CheckpointTensor]]:
    """Main weights by name, and the model's weights that belong to them."""
    models = _models(checkpoint)
    for tensor in checkpoint.tensors:
        if tensor.kind == MAIN_WEIGHTS and not tensor.is_bucket and tensor.key in models:
            yield tensor, models[tensor.key]


def compare(checkpoint: Checkpoint, record: Record | None) -> Iterator[Compared]:
    """Compare all main weights whose model weights are known.

    Raises:
        CheckpointError: something cannot be read.
    """
    for main, model in pairs(checkpoint):
        for chunk in main.chunks:
            wrong = sum(
                int(unlike(values, model.box(offsets, tuple(values.shape))).sum())
                for offsets, values in main.boxes(chunk)
            )
            yield main.name, chunk.item.name, math.prod(chunk.sizes), wrong
    if record is not None:
        yield from _of_buckets(checkpoint, record)


def _of_buckets(checkpoint: Checkpoint, record: Record) -> Iterator[Compared]:
    models = _models(checkpoint)
    for tensor in checkpoint.tensors:
        if tensor.kind != MAIN_WEIGHTS or not tensor.is_bucket:
            continue
        for inside in record.buckets.get(tensor.key, ()):
            flat = tensor.box((inside.start,), (math.prod(inside.shape),)).view(inside.shape)
            for name, box in inside.boxes:
                key, axes = split_name(name)
                if key not in models or name not in record.tensors.get(WEIGHTS, {}):
                    continue
                bounds = zip(box.place, box.size, strict=True)
                main = flat[tuple(slice(start, start + size) for start, size in bounds)]
                offsets, sizes = (*axes, *box.offset), (*(1 for _ in axes), *box.size)
                model = models[key].box(offsets, sizes).view(box.size)
                wrong = int(unlike(main, model).sum())
                yield f"main weights of {name}", tensor.name, model.numel(), wrong
