"""What ``torch.save`` writes: a zip archive with a pickle and the storages that it refers to."""

import io
import stat
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from megatron_came.checkpoint_files import pickles
from megatron_came.checkpoint_files.errors import REMEDY, CheckpointError, cannot_be_read
from megatron_came.checkpoint_files.names import StorageKind
from megatron_came.checkpoint_files.tensors import READ_BYTES, Storage

PICKLE = "data.pkl"
# Records of the zip format: before a member, and of it in the directory at the end.
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
# Its last records; the first two are there in files of PyTorch's.
_END64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
# Where a header has the CRC-32 of its member, from its own beginning.
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16
# A file from before zip archives were used begins with a pickle of this number.
OLD_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


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
        raise CheckpointError(f"{path} is gone: {REMEDY}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened ({error.strerror}): see to it that you may read it."
        ) from error


class Archive:
    """An archive, which is a file or lies in one; use it in a ``with`` statement.

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
                f"{REMEDY}"
            )
        self._bytes = _Window(self._file, start, end - start)
        if self._bytes.read(len(OLD_MAGIC) + 2)[2:] == OLD_MAGIC:  # two bytes of protocol before it
            raise CheckpointError(
                f"{self.name} is in a format from before PyTorch 1.6: load it with the PyTorch "
                "that wrote it, if you trust it, and save it anew with a newer one."
            )
        try:
            archive = zipfile.ZipFile(cast(BinaryIO, self._bytes))
        except Exception as error:
            raise cannot_be_read(self.name, error) from error
        if problem := self._other_reading(archive):
            raise cannot_be_read(self.name, problem)
        files = {each.filename: each for each in archive.infolist()}
        folder = next(iter(files), "").partition("/")[0] + "/"  # PyTorch looks nowhere else
        self.members = {
            name.removeprefix(folder): each
            for name, each in files.items()
            if name.startswith(folder)
        }
        if PICKLE not in self.members:
            raise cannot_be_read(self.name, f"it has no {PICKLE}")
        if "constants.pkl" in self.members:
            raise cannot_be_read(self.name, "it is a TorchScript program")
        return archive

    def _other_reading(self, archive: zipfile.ZipFile) -> str | None:
        """Say why PyTorch may read something else in it than is read here, or None."""
        # Otherwise a file could show this reader tensors, and run code where it is loaded.
        size = self._bytes.seek(0, io.SEEK_END)
        records = size - min(size, _LOCATOR.size + _END64.size + _END.size)
        self._bytes.seek(records)
        tail = self._bytes.read(size - records)
        signature, *numbers, comment = _END.unpack(tail[-_END.size :])
        # Where an end is not the last thing, each reader searches for one in its own way.
        if signature != b"PK\x05\x06" or comment:
            return "something follows its end"
        end, counted = size - _END.size, numbers[3:]  # entries, length and start of the directory
        if tail[-_END.size - _LOCATOR.size :].startswith(b"PK\x06\x07"):
            end = records
            locator = _LOCATOR.unpack(tail[_END64.size : -_END.size])
            signature, *_, entries, length, start = _END64.unpack(tail[: _END64.size])
            if signature != b"PK\x06\x06" or locator[2] != records:
                return "its end contradicts itself"
            most = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)  # what the short record has of larger numbers
            if counted != [*map(min, (entries, length, start), most)]:
                return "its end contradicts itself"
            counted = [entries, length, start]
        self._bytes.seek(0)
        if counted[2] != archive.start_dir or counted[1] != end - archive.start_dir:
            return "something stands before it or its directory"
        if self._bytes.read(4) != b"PK\x03\x04":  # PyTorch takes it for a pickle
            return "something stands before it"
        entries = archive.infolist()
        # PyTorch looks them up without regard to case; zipfile cuts them at a NUL.
        names = [each.filename.lower() for each in entries]
        if len(set(names)) != counted[0] or not all(
            each.filename == each.orig_filename and each.filename.isascii() for each in entries
        ):
            return "its directory has names twice, or in other letters"
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # tensors that were not read are lost

    def load(self) -> Any:
        """Read the pickle; tensors in it are :class:`StoredTensor`, read while this is open.

        Raises:
            ForeignClassError: the pickle names what Megatron does not write.
            CheckpointError: it cannot be read.
        """
        if "byteorder" in self.members and bytes(self.whole("byteorder")) != b"little":
            raise CheckpointError(
                f"{self.name} was written on a big-endian machine: inspect it there."
            )
        return pickles.load(bytes(self.whole(PICKLE)), self.name, self._storage)

    def _storage(self, pid: Any) -> Storage:
        word, kind, key, _, numel = pid  # as torch.save has them; the other is a device
        if word != "storage" or not isinstance(kind, StorageKind) or not isinstance(key, str):
            raise ValueError("it refers to what is no storage")
        if type(numel) is not int or numel < 0:  # nor a bool
            raise ValueError("a storage in it has no number of elements")
        member = f"data/{key}"
        info = self.members.get(member)
        if info is None or numel * kind.dtype.itemsize > info.file_size:
            raise ValueError(f"storage {key!r:.40} is not in it, or shorter than it should be")
        self.offset_of(member)  # it has a header, which PyTorch wants
        return Storage(self.name, member, partial(self._read, member), kind.dtype, numel)

    def whole(self, member: str) -> bytearray:
        """All bytes of a member."""
        return self._read(member, 0, self.members[member].file_size)

    def _read(self, member: str, start: int, count: int) -> bytearray:
        offset, size = self.offset_of(member), self.members[member].file_size
        self._bytes.seek(offset + start)
        data = self._bytes.read(count)
        if start + count > size or len(data) != count:
            raise cannot_be_read(self.name, f"{member} in it has {size} bytes, or is truncated")
        return bytearray(data)

    def offset_of(self, member: str) -> int:
        """Where a member's bytes begin in the archive.

        Raises:
            CheckpointError: it is compressed, which nothing that ``torch.save`` writes is.
        """
        entry = self.members[member]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise cannot_be_read(self.name, f"{member} in it is compressed")
        self._bytes.seek(entry.header_offset)
        header = self._bytes.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise cannot_be_read(self.name, f"{member} in it has no header")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        return int(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length)

    def checksum_offsets(self, member: str) -> list[int]:
        """Where in the archive a member's CRC-32 stands: behind its bytes, and in the directory."""
        entry = self.members[member]
        behind = self.offset_of(member) + entry.file_size
        self._bytes.seek(behind)
        # A flag says that a record of their checksum follows the bytes.
        has_descriptor = self._bytes.read(4) == b"PK\x07\x08" and entry.flag_bits & 8
        # Behind its signature.
        first = behind + 4 if has_descriptor else entry.header_offset + _CRC_IN_LOCAL
        position = self._zip.start_dir
        for other in self._zip.infolist():
            if other is entry:
                break
            self._bytes.seek(position)
            header = _CENTRAL_HEADER.unpack(self._bytes.read(_CENTRAL_HEADER.size))
            position += _CENTRAL_HEADER.size + sum(header[10:13])  # name, extra field, comment
        return [first, position + _CRC_IN_CENTRAL]

    def is_wrong(self, member: str) -> bool:
        """Whether a member has another CRC-32 than was written with it; 0 is no checksum."""
        entry, found = self.members[member], 0
        self._bytes.seek(self.offset_of(member))
        for start in range(0, entry.file_size, READ_BYTES):
            found = zlib.crc32(self._bytes.read(min(READ_BYTES, entry.file_size - start)), found)
        return entry.CRC not in (0, found)  # torch.serialization.set_crc32_options(False)


class _Window(io.RawIOBase):
    """Some of a file's bytes, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._length)[whence]
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
