"""Documents as they lie in files: text and JSON Lines, compressed or not."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron_came.data.folders import UnusableError, cannot_be_read
from megatron_came.data.unpacking import Streams

_READ_BYTES = 1 << 24  # bytes read at a time where a separator is looked for
_LONGEST_PROBE = 1 << 26  # bytes of a first line that decides what a .json file is

# What is unpacked on the way, by the last suffix in small letters.
_UNPACK: dict[str, Callable[[BinaryIO], object]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw: io.BufferedReader(Streams(raw, bz2.BZ2Decompressor)),
    ".xz": lambda raw: io.BufferedReader(Streams(raw, lzma.LZMADecompressor)),
}
_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
_PACKED_OTHERWISE = frozenset(
    (".zst", ".zstd", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")
)

# What begins so is no text, whatever its name says.
_UNNAMED = "name it so, with a suffix of {}, or unpack it"
_BEGINS = {
    b"\x1f\x8b": ("a gzip file", _UNNAMED.format(".gz")),
    b"BZh": ("a bzip2 file", _UNNAMED.format(".bz2")),
    b"\xfd7zXZ\0": ("an xz file", _UNNAMED.format(".xz")),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it first"),
    b"PK\3\4": ("a zip file", "unpack it first"),
    b"\xff\xfe": ("UTF-16 or UTF-32 text", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How documents lie in files."""

    # "auto" is "jsonl" for names that end in .jsonl, .ndjson or .json, before a .gz, .bz2 or .xz
    # if there is one, and "text" for others.
    format: Literal["auto", "text", "jsonl"] = "auto"
    json_key: str = "text"  # where a JSON object has the text
    separator: str | None = None  # between documents of a text file; without, it is one document


@dataclass(frozen=True, slots=True)
class Record:
    """A document as its file has it: not decoded yet, as decoding is work for several processes."""

    path: str
    raw: bytes
    line: int = 0  # which line of the file it is, from 1; 0 if it is not a line
    json_key: str | None = None  # where the line's JSON object has the text; None for plain text
    required: bool = True  # whether it is an error if it cannot be used

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path}, line {self.line}," if self.line else self.path

    def text(self) -> str:
        """Decode it; raise an UnusableError if it is no text."""
        if self.json_key is not None:
            return _from_json(_decode(self.raw), self.json_key)
        if b"\0" in self.raw:
            raise _no_text(self.raw, UnusableError("is not text", "name a text file"))
        text = _decode(self.raw)
        if not text.strip():
            raise _empty()
        return text


def _empty() -> UnusableError:
    return UnusableError("is empty", "put some text in, or name another file")


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        other = UnusableError("is not UTF-8 text", "convert it to UTF-8")
        raise _no_text(raw, other) from error


def _no_text(raw: bytes, other: UnusableError) -> UnusableError:
    """Say what bytes are that begin as those of no text do."""
    for begin, (what, remedy) in _BEGINS.items():
        if raw.startswith(begin):
            return UnusableError(f"is {what}", remedy)
    return other


def _from_json(line: str, key: str) -> str:
    try:
        text = json.loads(line)[key]
        if not isinstance(text, str):
            raise TypeError(key)
        if "\\u" in line:
            text.encode()  # an escape may have given half a surrogate pair, which is no text
        return text
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UnusableError(
            f'has no JSON object with a text under "{key}"',
            "correct that line, give the right --json-key, or --skip-faulty to leave such out",
        ) from error


def read_records(path: Path, raw: BinaryIO, layout: Layout) -> Iterator[Record]:
    """Cut a file, open as it lies on the disk, into documents; an UnusableError if it cannot be."""
    suffix = path.suffix.lower()
    if suffix in _PACKED_OTHERWISE or path.stem.lower().endswith(".tar"):
        raise UnusableError("is packed in a way that is not read here", "unpack it first")
    # A file that is unpacked reads as any other, but its type does not say so.
    file = cast(BinaryIO, _UNPACK[suffix](raw)) if suffix in _UNPACK else raw
    count = 0
    try:
        records = _lines if _holds_json_lines(path, file, layout) else _texts
        for count, record in enumerate(records(path, file, layout), start=1):  # noqa: B007
            yield record
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise cannot_be_read(error) from error
        reason = f"is no whole {_NAMES.get(suffix, '')} file"
        raise UnusableError(reason, "compress it again") from error
    if not count:
        raise _empty()


def _holds_json_lines(path: Path, file: BinaryIO, layout: Layout) -> bool:
    if layout.format != "auto":
        return layout.format == "jsonl"
    name = Path(path.stem) if path.suffix.lower() in _UNPACK else path
    suffix = name.suffix.lower()
    if suffix != ".json":
        return suffix in (".jsonl", ".ndjson")
    # Others' .json files hold one value over many lines; the first line tells.
    first = file.readline(_LONGEST_PROBE)
    file.seek(0)
    if first.strip():
        try:
            Record(str(path), first, json_key=layout.json_key).text()
        except UnusableError as error:
            raise UnusableError(
                f"{error.reason} in its first line",
                "give the right --json-key, or --format text to take it as it is",
            ) from error
    return True


def _lines(path: Path, file: BinaryIO, layout: Layout) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield Record(str(path), line, number, layout.json_key)


def _texts(path: Path, file: BinaryIO, layout: Layout) -> Iterator[Record]:
    """Read a file whole, or cut at separators, without what is between two and has no text."""
    if layout.separator is None:
        yield Record(str(path), file.read())
        return
    separator = layout.separator.encode()
    rest = b""
    while more := file.read(_READ_BYTES):
        *whole, rest = (rest + more).split(separator)
        yield from (Record(str(path), text) for text in whole if text.strip())
    if rest.strip():
        yield Record(str(path), rest)
