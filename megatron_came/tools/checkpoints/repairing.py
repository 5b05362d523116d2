"""Main weights made anew from the model's weights.

Megatron 0.16 to 0.19.2 saves fully reshardable checkpoints shifted behind the first bucket with
padding (NVIDIA/Megatron-LM#5077): main weights and momentum of a parameter are then those of its
neighbours. The model's weights and CAME's factors are right. So main weights are taken from the
model's, and momentum, which stands nowhere else, begins again at zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.torch_dist import Chunk, DistributedTensor
from megatron_came.core import digests
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, Record
from megatron_came.tools.checkpoints import names
from megatron_came.tools.checkpoints.main_weights import pairs, unlike
from megatron_came.tools.checkpoints.proofs import Proofs
from megatron_came.tools.checkpoints.rewriting import overwrite, replace_text


@dataclass(frozen=True, slots=True)
class Loss:
    """A chunk that is to be made anew, or a momentum that is to begin at zero.

    Attributes:
        name: the parameter's key.
        main: tensor and chunk of the main weights; None if they are right.
        model: the model's weights.
        momentum: tensor and chunks of the momentum; none if it is right.
        reason: why.
    """

    name: str
    main: tuple[DistributedTensor, Chunk] | None
    model: DistributedTensor
    momentum: tuple[tuple[DistributedTensor, Chunk], ...]
    reason: str

    def line(self) -> str:
        """What is done about it."""
        _, chunk = self.main or self.momentum[0]
        where = self.name
        if any(chunk.offsets):
            where += f" from {list(chunk.offsets)} on"
        done = []
        if self.main is not None:
            bits = str(self.model.dtype).removeprefix("torch.")
            done.append(f"main weights are the model's {bits} weights")
        if self.momentum:
            done.append("momentum is lost and begins at zero")
        return f"repaired: {where} ({self.reason}): {', '.join(done)}"


def losses(checkpoint: Checkpoint, record: Record | None) -> list[Loss]:
    """Find what has to be made anew.

    Args:
        checkpoint: of which the model's weights are sound.
        record: its digests, if it has some, which tell momentum that is right.

    Raises:
        CheckpointError: something cannot be read.
    """
    stored = {each.name: each for each in checkpoint.tensors if isinstance(each, DistributedTensor)}
    wrong = None if record is None else _wrong_by_digest(checkpoint, record)
    found: list[Loss] = []
    unsure: list[Loss] = []
    for main, model in pairs(checkpoint):
        known = names.named(main.name)
        key = known[1] if known else main.name
        momentum = _momentum(stored, key)
        for chunk in main.chunks:
            lost = tuple((tensor, each) for tensor, each in momentum if _overlap(each, chunk))
            values = model.box(chunk.offsets, chunk.sizes)
            if wrong is not None:
                bad_main = any(
                    (MAIN_WEIGHTS, digests.name_of(key, axes)) in wrong
                    for axes in _axes(record, MAIN_WEIGHTS, key, chunk)
                )
                lost = tuple(
                    (tensor, each)
                    for tensor, each in lost
                    if any(
                        (MOMENTUM, digests.name_of(key, axes)) in wrong
                        for axes in _axes(record, MOMENTUM, key, each)
                    )
                )
                if bad_main or lost:
                    whose = (main, chunk) if bad_main else None
                    found.append(Loss(key, whose, model, lost, "as digests show"))
                continue
            count = int(unlike(main.box(chunk.offsets, chunk.sizes), values).sum())
            reason = f"{count} of {values.numel()} elements were others"
            if count:
                found.append(Loss(key, (main, chunk), model, lost, reason))
            elif values.numel() and _is_uniform(values):
                reason = "its elements are all alike, so that a shift would not be seen"
                unsure.append(Loss(key, (main, chunk), model, lost, reason))
            elif not all(_is_finite(tensor, each) for tensor, each in lost):
                found.append(Loss(key, None, model, lost, "its momentum was not finite"))
    return found + (unsure if any(loss.main for loss in found) else [])


def _momentum(
    stored: dict[str, DistributedTensor], key: str
) -> list[tuple[DistributedTensor, Chunk]]:
    tensors = (each for each in stored.values() if names.named(each.name) == (MOMENTUM, key))
    return [(tensor, chunk) for tensor in tensors for chunk in tensor.chunks]


def _overlap(one: Chunk, other: Chunk) -> bool:
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in spans)


def _axes(record: Record | None, kind: str, key: str, chunk: Chunk) -> Iterator[tuple[int, ...]]:
    """Indices along the axes before a parameter that the record names and a chunk has."""
    for name in record.tensors.get(kind, {}) if record else ():
        other, axes = digests.split_name(name)
        spans = zip(axes, chunk.offsets, chunk.sizes, strict=False)
        if other == key and all(start <= axis < start + size for axis, start, size in spans):
            yield axes


def _wrong_by_digest(checkpoint: Checkpoint, record: Record) -> set[tuple[str, str]]:
    return {(kind, name) for kind, name, _, _ in _proved(checkpoint, record).damaged()}


def _proved(checkpoint: Checkpoint, record: Record) -> Proofs:
    proofs = Proofs(record)
    for tensor in checkpoint.tensors:
        proofs.begin(tensor)
        for box in tensor.boxes():
            proofs.add(tensor, box)
    return proofs


def _is_uniform(values: Tensor) -> bool:
    return bool((values == values.reshape(-1)[0]).all())


def _is_finite(tensor: DistributedTensor, chunk: Chunk) -> bool:
    return bool(tensor.box(chunk.offsets, chunk.sizes).isfinite().all())


def apply(losses: list[Loss]) -> None:
    """Rewrite what was lost, in the files of the checkpoint that it was found in.

    Raises:
        CheckpointError: a file cannot be rewritten.
    """
    for loss in losses:
        if loss.main is not None:
            main, chunk = loss.main
            values = loss.model.box(chunk.offsets, chunk.sizes).to(main.dtype)
            overwrite(chunk, main.name, values)
        for tensor, chunk in loss.momentum:
            overwrite(chunk, tensor.name, torch.zeros(chunk.sizes, dtype=tensor.dtype))


def renew_digests(checkpoint: Checkpoint, record: Record) -> None:
    """Make the record that of the tensors as they are now.

    Raises:
        CheckpointError: the record cannot be rewritten.
    """
    proofs = _proved(checkpoint, record)
    tensors = {
        kind: {
            name: dataclasses.replace(saved, digest=proofs.total(kind, name))
            if kind in (MAIN_WEIGHTS, MOMENTUM)
            else saved
            for name, saved in named.items()
        }
        for kind, named in record.tensors.items()
    }
    new = digests.pack(dataclasses.replace(record, tensors=tensors))
    old = str(checkpoint.common[digests.KEY])
    for name, item in checkpoint.objects.items():
        if name.startswith("common_state/"):
            replace_text(item, old, new)
            return


def elements(loss: Loss) -> int:
    """How many elements of main weights are made anew."""
    return math.prod(loss.main[1].sizes) if loss.main else 0
