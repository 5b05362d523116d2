"""What a checkpoint's record of digests claims, as far as common state and metadata tell."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from megatron_came.checkpoint_files.errors import shown
from megatron_came.checkpoint_files.stored import CheckpointTensor, Chunk, ReadBox, Shape
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, split_name
from megatron_came.core.records import Record

Tensors = Collection[CheckpointTensor]


def contradictions(
    record: Record | None, iteration: object, optimizer: object, named: int | None
) -> Iterator[str]:
    """Say where a checkpoint's common state is not that of its digests, or of the named folder."""
    if record is not None and record.iteration != iteration:
        digests = f"the digests of {record.iteration}"
        yield f"the common state is of iteration {shown(iteration)}, {digests}"
    if named is not None and named != iteration:
        yield f"the common state is of iteration {shown(iteration)}, the folder of {named}"
    if record is not None and record.optimizer != optimizer:
        yield f"the arguments say --optimizer {shown(optimizer)}, the digests {record.optimizer}"


def metadata_flaws(
    record: Record, tensors: Tensors
) -> Iterator[tuple[str, str, CheckpointTensor | None, str]]:
    """Compare what metadata say of tensors with the record; of format torch_dist.

    Yields:
        Kind and name in the record, the tensor in question, and what is wrong with it.
    """
    found = {(each.kind, each.key): each for each in tensors if not each.is_bucket}
    bucketed = {
        name
        for inside in record.buckets.values()
        for parameter in inside
        for name, _ in parameter.boxes
    }
    for kind, named in record.tensors.items():
        for name, saved in named.items():
            # In a bucket, which is flat, it has no shape.
            if kind in (MAIN_WEIGHTS, MOMENTUM) and name in bucketed:
                continue
            key, axes = split_name(name)
            tensor = found.get((kind, key))
            if tensor is None:
                yield kind, name, None, "is in no file"
            elif tensor.shape[len(axes) :] != saved.shape:
                shape = tensor.shape[len(axes) :]
                yield kind, name, tensor, f"has shape {shape}, and {saved.shape} was saved"
            elif tensor.dtype_name != saved.dtype and not is_half_momentum(tensor):
                dtypes = f"{tensor.dtype_name}, and {saved.dtype} was saved"
                yield kind, name, tensor, f"is in {dtypes}"


def is_half_momentum(tensor: CheckpointTensor) -> bool:
    """Whether a tensor is momentum in bf16, which are fp32's upper halves."""
    return tensor.kind == MOMENTUM and tensor.dtype_name == "bfloat16"


def files_of(record: Record | None, tensors: Tensors, kind: str, name: str) -> set[str]:
    """Return the files of a distributed checkpoint that hold a tensor of its record."""
    key, axes = split_name(name)
    buckets = {
        bucket
        for bucket, inside in (record.buckets if record else {}).items()
        if any(name == other for parameter in inside for other, _ in parameter.boxes)
    }
    return {
        chunk.item.name
        for tensor in tensors
        if tensor.kind == kind and tensor.key in (buckets if tensor.is_bucket else {key})
        for chunk in tensor.chunks
        if tensor.is_bucket or holds(chunk, axes)
    }


def by_key(names: Iterable[str]) -> dict[str, dict[Shape, str]]:
    """Group names in a record by their keys, and by indices along the axes before these."""
    found: dict[str, dict[Shape, str]] = defaultdict(dict)
    for name in names:
        key, axes = split_name(name)
        found[key][axes] = name
    return found


def named_parts(box: ReadBox, names: Mapping[Shape, str]) -> Iterator[tuple[str, Tensor, Shape]]:
    """Take a box of a tensor apart along the axes that Megatron has put before it.

    ``names`` are those of its key, as :func:`by_key` has them.

    Yields:
        Name, values, and where these begin in the tensor of that name.
    """
    depth = len(next(iter(names), ()))
    for at in itertools.product(*map(range, box.values.shape[:depth])):
        # Of the offsets the first few, as many as there are such axes.
        name = names.get(tuple(i + o for i, o in zip(at, box.offsets, strict=False)))
        if name is not None:
            yield name, box.values[at], box.offsets[depth:]


def holds(chunk: Chunk, axes: tuple[int, ...]) -> bool:
    """Whether a chunk has what stands at these indices of its first axes."""
    bounds = zip(axes, chunk.offsets, chunk.sizes, strict=False)
    return all(start <= index < start + size for index, start, size in bounds)
