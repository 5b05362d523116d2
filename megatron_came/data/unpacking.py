"""What is compressed as several streams, one after another, is read to its end.

Python's own readers take what they cannot unpack after the first stream for something else that
stands behind, and leave out all from there on: damage too.
"""

import io
from bz2 import BZ2Decompressor
from collections.abc import Callable
from lzma import LZMADecompressor
from typing import BinaryIO

_READ_BYTES = 1 << 16


class Streams(io.RawIOBase):
    """Reads all streams of a file; zeros between them, or at the end, are padding.

    Args:
        raw: the file as it lies on the disk.
        make: what unpacks one stream.

    Raises:
        EOFError: the last one breaks off.
        OSError, lzma.LZMAError: one is damaged.
    """

    def __init__(
        self, raw: BinaryIO, make: Callable[[], BZ2Decompressor | LZMADecompressor]
    ) -> None:
        self._raw, self._make, self._stream = raw, make, make()

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read again, from the beginning."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go back to the beginning."""
        if (offset, whence) != (0, 0):
            raise io.UnsupportedOperation("only to the beginning")
        self._stream = self._make()
        return self._raw.seek(0)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer with what comes next, or some of it; return how much, 0 at the end."""
        unpacked = b""
        while not unpacked:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed:
                    if not (more := self._raw.read(_READ_BYTES)):
                        return 0
                    packed = more.lstrip(b"\0")
                self._stream = self._make()
            elif self._stream.needs_input and not (packed := self._raw.read(_READ_BYTES)):
                raise EOFError("breaks off")
            unpacked = self._stream.decompress(packed, len(buffer))
        buffer[: len(unpacked)] = unpacked
        return len(unpacked)
