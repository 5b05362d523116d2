"""What ``torch.save`` writes: a zip archive with a pickle and the storages that it refers to."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from megatron_came.checkpoint_files import pickles
from megatron_came.checkpoint_files.errors import CheckpointError, cannot_be_read
from megatron_came.checkpoint_files.tensors import PIECE_BYTES, Storage, StorageKind

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
# A file from before zip archives were used begins with a pickle of this number.
_OLD_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def open_regular(path: Path) -> BinaryIO:
    """Open a file that is one: neither a pipe that never ends nor a device.

    Raises:
        CheckpointError: it is gone, is something else, or cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(
                f"{path} is not a file: remove it, or take the checkpoint from a copy."
            )
        return path.open("rb")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is gone: take the file from a copy, or another iteration's folder."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened ({error.strerror}): see to it that you may read it."
        ) from error


class Archive:
    """An archive, which is a file or a part of one; use it in a ``with`` statement.

    Args:
        path: the file.
        start: of the archive's first byte in it.
        length: of the archive; to the end of the file if None.

    Raises:
        CheckpointError: it is no such archive.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.name = str(path)
        self._file = open_regular(path)
        try:
            self._zip = self._open(start, length)
        except BaseException:
            self._file.close()
            raise

    def _open(self, start: int, length: int | None) -> zipfile.ZipFile:
        size = self._file.seek(0, io.SEEK_END)
        end = size if length is None else start + length
        if not 0 <= start <= end <= size:
            raise CheckpointError(
                f"{self.name} has {size} bytes where at least {end} were written: it is truncated; "
                "take the file from a copy, or another iteration's folder."
            )
        self._slice = _Slice(self._file, start, end - start)
        if self._slice.read(len(_OLD_MAGIC) + 2)[2:] == _OLD_MAGIC:
            raise CheckpointError(
                f"{self.name} is in a format from before PyTorch 1.6: load it with the PyTorch "
                "that wrote it, if you trust it, and save it anew with a newer one."
            )
        try:
            archive = zipfile.ZipFile(cast(BinaryIO, self._slice))
        except Exception as error:
            raise cannot_be_read(self.name, error) from error
        try:
            prefix = next(
                each.filename.removesuffix("data.pkl")
                for each in archive.infolist()
                if each.filename.count("/") == 1 and each.filename.endswith("/data.pkl")
            )
            self.records = {
                each.filename.removeprefix(prefix): each
                for each in archive.infolist()
                if each.filename.startswith(prefix)
            }
        except StopIteration:
            archive.close()
            raise cannot_be_read(self.name, "it has no data.pkl") from None
        return archive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were not read are lost."""
        self._zip.close()
        self._file.close()

    def load(self) -> Any:
        """Read the pickle; tensors in it are :class:`StoredTensor`, read while this is open.

        Raises:
            ForeignClassError: the pickle names what Megatron does not write.
            CheckpointError: it cannot be read.
        """
        if "byteorder" in self.records and bytes(self.whole("byteorder")) != b"little":
            raise CheckpointError(
                f"{self.name} was written on a big-endian machine: inspect it there."
            )
        return pickles.load(bytes(self.whole("data.pkl")), self.name, self._storage)

    def _storage(self, pid: Any) -> Storage:
        word, kind, key, _, numel = pid
        if word != "storage" or not isinstance(kind, StorageKind) or not isinstance(key, str):
            raise ValueError("it refers to what is no storage")
        if type(numel) is not int or numel < 0:
            raise ValueError("a storage in it has no number of elements")
        record = self.records.get(f"data/{key}")
        if record is None or numel * kind.dtype.itemsize > record.file_size:
            raise ValueError(f"storage {key!r:.40} is not in it, or shorter than it should be")
        return Storage(self, key, kind.dtype, numel)

    def read(self, key: str, start: int, count: int) -> bytearray:
        """Bytes of a storage; see :class:`~megatron_came.checkpoint_files.tensors.Source`."""
        return self._bytes(f"data/{key}", start, count)

    def whole(self, record: str) -> bytearray:
        """All bytes of a record."""
        return self._bytes(record, 0, self.records[record].file_size)

    def _bytes(self, record: str, start: int, count: int) -> bytearray:
        place = self.place(record)
        size = self.records[record].file_size
        if start + count > size:
            raise cannot_be_read(self.name, f"record {record} has {size} bytes only")
        self._slice.seek(place + start)
        data = self._slice.read(count)
        if len(data) != count:
            raise cannot_be_read(self.name, f"record {record} is truncated")
        return bytearray(data)

    def place(self, record: str) -> int:
        """Where a record's bytes begin in the archive.

        Raises:
            CheckpointError: it is compressed, which nothing that ``torch.save`` writes is.
        """
        entry = self.records[record]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise cannot_be_read(self.name, f"record {record} is compressed")
        self._slice.seek(entry.header_offset)
        header = self._slice.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise cannot_be_read(self.name, f"record {record} has no header")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        return int(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length)

    def checksum_places(self, record: str) -> list[int]:
        """Where in the archive a record's CRC-32 stands: behind its bytes, and in the directory.

        Raises:
            CheckpointError: it is in neither place.
        """
        entry = self.records[record]
        behind = self.place(record) + entry.file_size
        self._slice.seek(behind)
        has_descriptor = self._slice.read(4) == b"PK\x07\x08" and entry.flag_bits & 8
        places = [behind + 4 if has_descriptor else entry.header_offset + 14]
        position = self._zip.start_dir
        for other in self._zip.infolist():
            self._slice.seek(position)
            header = _CENTRAL_HEADER.unpack(self._slice.read(_CENTRAL_HEADER.size))
            if other is entry:
                return [*places, position + 16]
            position += _CENTRAL_HEADER.size + sum(header[10:13])
        raise cannot_be_read(self.name, f"record {record} is not in its directory")

    def wrong_records(self) -> list[str]:
        """Names of records whose bytes have another checksum than was written with them."""
        return [name for name in self.records if self.is_wrong(name)]

    def is_wrong(self, record: str) -> bool:
        """Whether a record has another CRC-32 than was written; 0 is no checksum."""
        entry, place, found = self.records[record], self.place(record), 0
        for start in range(0, entry.file_size, PIECE_BYTES):
            self._slice.seek(place + start)
            count = min(PIECE_BYTES, entry.file_size - start)
            found = zlib.crc32(self._slice.read(count), found)
        return entry.CRC not in (0, found)


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("it begins before its beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data
