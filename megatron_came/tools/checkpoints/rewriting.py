"""Changes elements and strings in files of ``torch.save``, where they stand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from torch import Tensor

from megatron_came.checkpoint_files.archives import Archive
from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.tensors import PIECE_BYTES
from megatron_came.checkpoint_files.torch_dist import Chunk, Item


def overwrite(chunk: Chunk, name: str, values: Tensor) -> None:
    """Put other elements in place of a chunk's.

    Args:
        chunk: in the file that is changed.
        name: of its tensor.
        values: of its shape and dtype.

    Raises:
        CheckpointError: its elements do not lie in order.
    """
    with chunk.open() as archive:
        stored = chunk.stored(archive, name, values.dtype)
        if not stored.is_contiguous:
            raise CheckpointError(
                f"{chunk.item.file} holds {name} with strides, which repair cannot rewrite: resume "
                "from the checkpoint's weights with --no-load-optim."
            )
        record = f"data/{stored.storage.key}"
        start = stored.start * stored.dtype.itemsize
        change = _Change(archive, record)
    data = values.contiguous().view(-1).numpy().tobytes()
    change.write(chunk.item.file, chunk.item.start, start, data)


def replace_text(item: Item, old: str, new: str) -> None:
    """Put a string in place of another one of the same length in an object's pickle.

    Raises:
        CheckpointError: the old one is not there once.
    """
    before, after = old.encode(), new.encode()
    with Archive(item.file, item.start, item.length) as archive:
        pickled = bytes(archive.whole("data.pkl"))
        change = _Change(archive, "data.pkl")
    if pickled.count(before) != 1 or len(before) != len(after):
        raise CheckpointError(f"{item.file} does not hold its record of digests as it is written.")
    change.write(item.file, item.start, pickled.index(before), after)


class _Change:
    """Where a record and its checksums stand."""

    def __init__(self, archive: Archive, record: str) -> None:
        self._place = archive.place(record)
        self._size = archive.records[record].file_size
        self._checksums = archive.checksum_places(record)

    def write(self, path: Path, base: int, start: int, data: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(base + self._place + start)
            file.write(data)
            file.seek(base + self._place)
            left, found = self._size, 0
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                found, left = zlib.crc32(piece, found), left - len(piece)
            for place in self._checksums:
                file.seek(base + place)
                file.write(struct.pack("<I", found))
