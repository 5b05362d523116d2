"""Main weights made anew from the model's weights.

Megatron 0.16 to 0.19.2 saves fully reshardable checkpoints shifted behind the first bucket with
padding (NVIDIA/Megatron-LM#5077): main weights and momentum of a parameter are then those of its
neighbours. The model's weights and CAME's factors are right. So main weights are taken from the
model's, and momentum, which stands nowhere else, begins again at zero.
"""

import dataclasses
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_came.checkpoint_files.archives import PICKLE, Archive
from megatron_came.checkpoint_files.claims import holds
from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.folder import Checkpoint
from megatron_came.checkpoint_files.stored import CheckpointTensor, Chunk, Item
from megatron_came.checkpoint_files.tensors import READ_BYTES
from megatron_came.core import digests, records
from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM
from megatron_came.core.records import Record
from megatron_came.tools.checkpoints.proofs import Proofs, pairs, unlike


@dataclass(frozen=True, slots=True)
class Loss:
    """Main weights of a chunk that are to be made anew, and momentum that is to begin at zero."""

    main: CheckpointTensor
    chunk: Chunk  # of the main weights
    model: CheckpointTensor  # the model's weights
    # Tensor and chunks of the momentum; none if it is right.
    momentum: tuple[tuple[CheckpointTensor, Chunk], ...]
    reason: str
    is_of_main: bool = True  # whether main weights are damaged, and not the momentum alone

    def line(self) -> str:
        """What is done about it."""
        chunk = self.chunk if self.is_of_main else self.momentum[0][1]
        where = f" from {list(chunk.offsets)} on" if any(chunk.offsets) else ""
        done = []
        if self.is_of_main:
            done.append(f"main weights are the model's {self.model.dtype_name} weights")
        if self.momentum:
            done.append("momentum is lost and begins at zero")
        return f"repaired: {self.main.key}{where} ({self.reason}): {', '.join(done)}"

    @property
    def numel(self) -> int:
        """How many elements of main weights are made anew."""
        return math.prod(self.chunk.sizes) if self.is_of_main else 0


def losses(checkpoint: Checkpoint, record: Record | None) -> list[Loss]:
    """Find what has to be made anew, of a checkpoint of which the model's weights are sound.

    Its digests, if it has some, tell momentum that is right.

    Raises:
        CheckpointError: something cannot be read.
    """
    candidates = []
    for main, model in pairs(checkpoint):
        momenta = [t for t in checkpoint.tensors if (t.kind, t.key) == (MOMENTUM, main.key)]
        for chunk in main.chunks:
            momentum = [
                (each, its) for each in momenta for its in each.chunks if _overlap(its, chunk)
            ]
            candidates.append(Loss(main, chunk, model, tuple(momentum), ""))
    # Digests tell what is damaged; without them, that two tensors contradict each other.
    if record is not None:
        return list(_by_digests(candidates, checkpoint, record))
    found, unsure = [], []
    for loss in candidates:
        values = loss.model.box(loss.chunk.offsets, loss.chunk.sizes)
        mains = loss.main.box(loss.chunk.offsets, loss.chunk.sizes)
        count = int(unlike(mains, values).sum())
        if count:
            reason = f"{count} of {values.numel()} elements were others"
            found.append(dataclasses.replace(loss, reason=reason))
        elif values.numel() and (values == values.reshape(-1)[0]).all():
            reason = "its elements are all alike, so that a shift would not be seen"
            unsure.append(dataclasses.replace(loss, reason=reason))
        elif not all(t.box(c.offsets, c.sizes).isfinite().all() for t, c in loss.momentum):
            reason = "its momentum was not finite"
            found.append(dataclasses.replace(loss, reason=reason, is_of_main=False))
    # Where others are shifted, so may these be; where none is, nothing speaks for it.
    return found + (unsure if any(loss.is_of_main for loss in found) else [])


def _by_digests(candidates: list[Loss], checkpoint: Checkpoint, record: Record) -> Iterator[Loss]:
    """Those that digests show to be damaged."""
    wrong = [
        (kind, *digests.split_name(name))
        for kind, name, _, _ in _proved(checkpoint, record).damaged()
    ]

    def is_wrong(tensor: CheckpointTensor, chunk: Chunk) -> bool:
        return any(
            (kind, key) == (tensor.kind, tensor.key) and holds(chunk, axes)
            for kind, key, axes in wrong
        )

    for loss in candidates:
        is_of_main = is_wrong(loss.main, loss.chunk)
        momentum = tuple(each for each in loss.momentum if is_wrong(*each))
        if is_of_main or momentum:
            reason = "as digests show"
            yield Loss(loss.main, loss.chunk, loss.model, momentum, reason, is_of_main)


def _overlap(one: Chunk, other: Chunk) -> bool:
    bounds = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in bounds)


def _proved(checkpoint: Checkpoint, record: Record) -> Proofs:
    proofs = Proofs(record, checkpoint.tensors)
    for tensor in checkpoint.tensors:
        for box in tensor.boxes():
            proofs.add(tensor, box)
    return proofs


def apply(losses: list[Loss]) -> None:
    """Rewrite what was lost, in the files of the checkpoint that it was found in.

    Raises:
        CheckpointError: a file cannot be rewritten.
    """
    for loss in losses:
        if loss.is_of_main:
            values = loss.model.box(loss.chunk.offsets, loss.chunk.sizes).to(loss.main.dtype)
            overwrite(loss.main, loss.chunk, values)
        for tensor, chunk in loss.momentum:
            overwrite(tensor, chunk, torch.zeros(chunk.sizes, dtype=tensor.dtype))


def renew_digests(checkpoint: Checkpoint, record: Record) -> None:
    """Make the record that of the tensors as they are now.

    Raises:
        CheckpointError: the record cannot be rewritten.
    """
    proofs = _proved(checkpoint, record)
    tensors = dict(record.tensors)
    for kind in tensors.keys() & {MAIN_WEIGHTS, MOMENTUM}:
        tensors[kind] = {
            name: dataclasses.replace(saved, digest=proofs.total(kind, name))
            for name, saved in tensors[kind].items()
        }
    new = records.pack(dataclasses.replace(record, tensors=tensors)).encode()
    old = str(checkpoint.common[records.KEY]).encode()
    for name, item in checkpoint.objects.items():
        if name.startswith("common_state/"):
            with item.open() as archive:
                pickled = archive.whole(PICKLE)
                # Rewritten in place: a longer one would move all that follows in the archive.
                if pickled.count(old) != 1 or len(old) != len(new):
                    raise CheckpointError(
                        f"{item.file} does not hold its record of digests as it is written."
                    )
                _write(archive, PICKLE, item, pickled.index(old), new)
            return


def overwrite(tensor: CheckpointTensor, chunk: Chunk, values: Tensor) -> None:
    """Put other elements, of its shape and dtype, in place of a chunk's, in its file.

    Raises:
        CheckpointError: its elements do not lie in order.
    """
    with tensor.opened(chunk) as (archive, stored):
        if not stored.is_contiguous:
            raise CheckpointError(
                f"{chunk.item.file} holds {tensor.name} with strides, which repair cannot rewrite: "
                "resume from the checkpoint's weights with --no-load-optim."
            )
        start = stored.start * stored.dtype.itemsize
        data = values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        _write(archive, stored.storage.member, chunk.item, start, data)


def _write(archive: Archive, member: str, item: Item, start: int, data: bytes) -> None:
    """Change some bytes of an archive's member, and the checksums that it has of them."""
    first, size = item.start + archive.offset_of(member), archive.members[member].file_size
    offsets, checksum = archive.checksum_offsets(member), 0
    with item.file.open("r+b") as file:
        file.seek(first + start)
        file.write(data)
        file.seek(first)
        for done in range(0, size, READ_BYTES):
            checksum = zlib.crc32(file.read(min(size - done, READ_BYTES)), checksum)
        for offset in offsets:
            # In the local header or behind the bytes, and in the directory.
            file.seek(item.start + offset)
            file.write(struct.pack("<I", checksum))
