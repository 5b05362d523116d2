"""What the tensors in files prove.

Digests are held beside those of the checkpoint's record, and main weights beside the model's
weights, which are these in the model's dtype.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_came.checkpoint_files.claims import by_key, files_of, metadata_flaws, named_parts
from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.legacy import flat_parameters
from megatron_came.checkpoint_files.stored import CheckpointTensor, Item, ReadBox, Shape
from megatron_came.core import digests, int8
from megatron_came.core.digests import MAIN_WEIGHTS, WEIGHTS, split_name
from megatron_came.core.records import Record

# Of CAME's state, as far as there are digests of it.
_DTYPES = (torch.float32, torch.bfloat16)

# Kind and name of a tensor in the record.
Named = tuple[str, str]
# Name of main weights, the file they lie in, how many were compared, and how many differ.
Compared = tuple[str, str, int, int]


class Proofs:
    """Compares tensors of format torch_dist with a record of digests, as they are read.

    Attributes:
        count: how many tensors the record names.
        unnamed: how many tensors the record does not name.
    """

    def __init__(self, record: Record, tensors: list[CheckpointTensor]) -> None:
        self._record, self._tensors = record, tensors
        self.count = sum(map(len, record.tensors.values()))
        # By name, box of the tensor and copy of that: several buckets may hold the same box.
        self._sums: dict[Named, dict[object, dict[object, int]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(int))
        )
        # Of what has another shape or dtype than was saved no digest can be compared.
        self._flaws: dict[Named, str] = {
            (kind, name): flaw for kind, name, _, flaw in metadata_flaws(record, tensors)
        }
        self._names = {kind: by_key(named) for kind, named in record.tensors.items()}
        self.unnamed = sum(
            not tensor.is_bucket and tensor.key not in self._names.get(tensor.kind or "", {})
            for tensor in tensors
        )

    def add(self, tensor: CheckpointTensor, box: ReadBox) -> None:
        """Add elements of a tensor."""
        if tensor.kind is None:
            return
        if tensor.is_bucket:
            self._add_bucket(tensor.kind, tensor.key, box)
            return
        names = self._names.get(tensor.kind, {}).get(tensor.key, {})
        for name, values, offset in named_parts(box, names):
            if (tensor.kind, name) not in self._flaws:
                size = tuple(values.shape)
                whole = self._record.tensors[tensor.kind][name].shape
                where = digests.PlacedBox.alone(size, offset, whole)
                self._sums[tensor.kind, name][offset][0] += _sum(tensor.kind, values, size, where)

    def _add_bucket(self, kind: str, key: str, box: ReadBox) -> None:
        # Buckets are flat and read a few MiB at a time, so that a box may have some of a parameter.
        first, last = box.offsets[0], box.offsets[0] + box.values.numel()
        for number, inside in enumerate(self._record.buckets.get(key, ())):
            low = max(inside.start, first)
            high = min(inside.start + math.prod(inside.shape), last)
            if low >= high:
                continue
            values = box.values[low - first : high - first]
            for name, where in inside.boxes:
                value = _sum(kind, values, inside.shape, where, low - inside.start)
                self._sums[kind, name][where.offset, where.size][key, number] += value

    def damaged(self) -> Iterator[tuple[str, str, str, set[str]]]:
        """Say what is not as it was saved.

        Yields:
            Kind, name, what is wrong, and the files.
        """
        for kind, named in self._record.tensors.items():
            for name, saved in named.items():
                sums = self._sums.get((kind, name), {}).values()
                flaw = self._flaws.get((kind, name))
                # A tensor without elements is in no file, and nothing is lost.
                if flaw is None and not sums and 0 not in saved.shape:
                    flaw = "is in no file"
                elif flaw is None and any(
                    # Tensor-parallel ranks' replicas, and those of tied embeddings, are equal.
                    len(set(map(digests.unsigned, copies.values()))) > 1
                    for copies in sums
                ):
                    flaw = "has copies that differ from each other"
                elif flaw is None and self.total(kind, name) != saved.digest:
                    flaw = "is not what was saved, as its digest shows"
                if flaw:
                    yield kind, name, flaw, files_of(self._record, self._tensors, kind, name)

    def total(self, kind: str, name: str) -> int:
        """The digest of what lies in the files: of one copy of each box."""
        sums = self._sums[kind, name].values()
        return digests.unsigned(sum(next(iter(copies.values())) for copies in sums))


def _sum(kind: str, values: Tensor, shape: Shape, box: digests.PlacedBox, start: int = 0) -> int:
    if kind != WEIGHTS and values.dtype not in _DTYPES:
        return 0  # it is damaged, as the sum shows then: CAME saves no such state
    terms = digests.terms(values, shape, box, start=start, as_fp32=kind != WEIGHTS)
    return digests.digest(terms)


def legacy_digests(
    checkpoint: Checkpoint, record: Record
) -> dict[str, tuple[Counter[tuple[Shape, int]], set[str]]]:
    """Compute digests of whole tensors of format torch, whose names are others than the record's.

    Returns:
        By kind, how often each shape and digest is there, and the files.
    """
    found: dict[str, tuple[Counter[tuple[Shape, int]], set[str]]] = {}
    # Without the distributed optimizer int8 momentum is saved as it is, codes and scales.
    scales = {each.name: each for each in checkpoint.tensors if each.name.endswith("_scale")}
    for tensor in checkpoint.tensors:
        if tensor.kind and tensor.key:
            counter, files = found.setdefault(tensor.kind, (Counter(), set()))
            values, scale = _read(tensor), scales.get(f"{tensor.name}_scale")
            blocks = (int8.blocks(values.numel()),)
            if values.dtype == torch.int8 and scale is not None and scale.shape == blocks:
                values = int8.dequantize(values, _read(scale))
            counter[tensor.shape, _whole(tensor.kind, values)] += 1
            files.update(tensor.files)
    for state in checkpoint.optimizers:
        for kind, buffer, elements in flat_parameters(state):
            counter, files = found.setdefault(kind, (Counter(), set()))
            files.add(Item(Path(buffer.storage.file)).name)
            named = record.tensors.get(kind, {}).values()
            shapes = {saved.shape for saved in named if math.prod(saved.shape) == len(elements)}
            values = buffer.rows(elements.start, len(elements))  # flat: the file has no shapes
            for shape in shapes:  # of which one is the parameter's
                counter[shape, _whole(kind, values.view(shape))] += 1
    return found


def _read(tensor: CheckpointTensor) -> Tensor:
    return tensor.box((0,) * len(tensor.shape), tensor.shape)


def _whole(kind: str, values: Tensor) -> int:
    """The digest; of no tensor for state in a dtype that CAME does not have."""
    if kind != WEIGHTS and values.dtype not in _DTYPES:
        return -1
    return digests.digest_whole(values, as_fp32=kind != WEIGHTS)


# Main weights beside the model's.


def unlike(main: Tensor, model: Tensor) -> Tensor:
    """Tell which fp32 main weights the model's weights, of the same shape, were not made of."""
    both_nan = main.isnan() & model.isnan()
    if model.dtype != torch.bfloat16:
        return (main.to(model.dtype) != model) & ~both_nan
    # Halfway between two, ranks may hold either until the first step has gathered the weights.
    bits = main.contiguous().view(torch.int32)
    lower = (bits >> 16).to(torch.int16)  # cut off: towards zero
    rounded = main.to(torch.bfloat16).view(torch.int16)
    found = model.contiguous().view(torch.int16)
    halfway = (bits & 0xFFFF) == 0x8000  # of 16 bits that bf16 lacks
    return (found != rounded) & ~(halfway & ((found == lower) | (found == lower + 1))) & ~both_nan


def _models(checkpoint: Checkpoint) -> dict[str, CheckpointTensor]:
    return {each.key: each for each in checkpoint.tensors if each.kind == WEIGHTS}


def pairs(checkpoint: Checkpoint) -> Iterator[tuple[CheckpointTensor, CheckpointTensor]]:
    """Main weights by name, and the model's weights that belong to them."""
    models = _models(checkpoint)
    for tensor in checkpoint.tensors:
        if tensor.kind == MAIN_WEIGHTS and not tensor.is_bucket and tensor.key in models:
            yield tensor, models[tensor.key]


def compared(checkpoint: Checkpoint, record: Record | None) -> Iterator[Compared]:
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
