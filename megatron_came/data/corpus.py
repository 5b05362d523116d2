"""Documents of text, from text files, folders and JSON Lines."""

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_came.data.errors import DataError
from megatron_came.data.files import whole_files

_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
_LIBRARY_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings"}


@dataclass(frozen=True)
class Document:
    """One text and the file it came from."""

    source: str
    text: str


@dataclass
class Corpus:
    """The documents of some files, read as they are iterated over.

    A file is one document, except that a file named ``*.jsonl`` holds one JSON object a line whose
    "text" is the document.

    Args:
        files: The files to read, in order.
        named: Those a person named one by one. A fault in one of these is an error; other files
            are skipped and counted.

    Attributes:
        skipped: How many files were skipped, by reason; complete once iterated over.
    """

    files: list[Path]
    named: frozenset[Path] = frozenset()
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_paths(cls, paths: Iterable[Path]) -> "Corpus":
        """Takes files as they are and folders with everything below them.

        Hidden files and folders below a folder are left out.

        Raises:
            DataError: If a path does not exist, or there is no file at all.
        """
        files: list[Path] = []
        named: set[Path] = set()
        for path in paths:
            if path.is_dir():
                files.extend(_walk(path))
            elif path.exists():
                files.append(path)
                named.add(path)
            else:
                raise DataError(f"{path} does not exist: name a text file or a folder of them.")
        if not files:
            raise DataError("There is no file in the folders named: name some that hold text.")
        return cls(files, frozenset(named))

    @classmethod
    def python_library(cls) -> "Corpus":
        """The sources and texts of the Python library, without tests and character tables."""
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, _LIBRARY_SKIPPED) if path.suffix in _LIBRARY_SUFFIXES]
        if not files:
            raise DataError(f"{root} holds no Python sources: name files of your own instead.")
        return cls(files)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(path.stat().st_size for path in self.files if path.is_file())

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents in order.

        Raises:
            DataError: If a file named one by one cannot be used.
        """
        self.skipped.clear()
        for path in self.files:
            try:
                yield from _read(path)
            except _UnusableError as error:
                if path in self.named:
                    raise DataError(f"{path} {error.args[0]}: {error.remedy}.") from error
                self.skipped[error.args[0]] += 1


class _UnusableError(Exception):
    """Why a file cannot be used, as a predicate, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def _walk(root: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in skipped)
        paths = (Path(folder, name) for name in sorted(names) if name[0] != ".")
        yield from (path for path in paths if path.is_file())  # reading a pipe would wait


def _read(path: Path) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".jsonl":
                yield from _read_json_lines(path, file)
            else:
                yield Document(str(path), _decode(file.read()))
    except OSError as error:
        reason = (error.strerror or "unknown error").lower()
        raise _UnusableError(
            f"cannot be read ({reason})", "make it a file you may read, or name another one"
        ) from error


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise _UnusableError("is not text", "name a text file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnusableError("is not UTF-8 text", "convert it to UTF-8") from error
    if not text.strip():
        raise _UnusableError("is empty", "put some text in, or name another file")
    return text


def _read_json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Document]:
    """Reads line by line, as such files may be large; a faulty line is an error in any file."""
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
            yield Document(str(record.get("source", path)), str(record["text"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path} has no JSON object with a "text" in line {number}: correct that line.'
            ) from error
    if empty:
        raise _UnusableError("is empty", "put some text in, or name another file")


def write_json_lines(documents: Iterable[Document], path: Path) -> int:
    """Writes documents as JSON Lines, whole or not at all, and returns how many.

    Raises:
        DataError: If there are none.
    """
    count = 0
    with whole_files(path) as (partial,), partial.open("w", encoding="utf-8") as file:
        for count, document in enumerate(documents, start=1):  # noqa: B007
            json.dump({"source": document.source, "text": document.text}, file, ensure_ascii=False)
            file.write("\n")
        if not count:
            raise DataError("None of the files holds text: name some that do.")
    return count
