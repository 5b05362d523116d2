"""Documents of text, from text files, folders and JSON Lines."""

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from megatron_came.data.errors import DataError, UnusableError
from megatron_came.data.files import whole_files
from megatron_came.data.records import Document, Layout, Record, cannot_be_read, read_records

_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
_LIBRARY_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings"}


@dataclass
class Skipped:
    """What was left out.

    Attributes:
        counts: How many files and lines, by reason.
        examples: The first of them, by reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, error: UnusableError, *, required: bool) -> None:
        """Counts a file or a line that cannot be used.

        Raises:
            DataError: If it is required.
        """
        if required:
            raise DataError(f"{place} {error.reason}: {error.remedy}.") from error
        self.counts[error.reason] += 1
        self.examples.setdefault(error.reason, place.rstrip(","))

    def update(self, other: "Skipped") -> None:
        """Adds what was left out elsewhere, later."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}

    def lines(self) -> list[str]:
        """A sentence for each reason."""
        return [
            f"Left out {self.examples[reason]}, which {reason}."
            if count == 1
            else f"Left out {count:,}, each of which {reason}; the first: {self.examples[reason]}."
            for reason, count in self.counts.items()
        ]


@dataclass
class Corpus:
    """The documents of some files, read as they are iterated over.

    Args:
        files: The files to read, in order.
        named: Those a person named one by one. A fault in one of these is an error; other files
            are skipped and counted. A faulty line of JSON Lines is an error in any file.
        layout: How documents lie in the files.
        tolerant: Whether nothing is an error, and all that is faulty is skipped and counted.

    Attributes:
        skipped: What was skipped; complete once iterated over.
        separated: Whether a separator, or the end of a line, has cut any file in two by now.
    """

    files: list[Path]
    named: frozenset[Path] = frozenset()
    layout: Layout = field(default_factory=Layout)
    tolerant: bool = False
    skipped: Skipped = field(default_factory=Skipped)
    separated: bool = False
    _bytes_before: int = field(default=0, repr=False)
    _file: BinaryIO | None = field(default=None, repr=False)

    @classmethod
    def from_paths(
        cls, paths: Iterable[Path], layout: Layout | None = None, *, tolerant: bool = False
    ) -> "Corpus":
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
        return cls(files, frozenset(named), layout or Layout(), tolerant)

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
        """Bytes in all files, as they lie on the disk."""
        return sum(path.stat().st_size for path in self.files if path.is_file())

    @property
    def position(self) -> int:
        """How many of these bytes the present iteration has read so far."""
        file = self._file
        readable = file is not None and not file.closed and file.seekable()
        return self._bytes_before + (file.tell() if file is not None and readable else 0)

    def records(self) -> Iterator[Record]:
        """Yields the documents in order, undecoded.

        Raises:
            DataError: If a file that must be usable is not.
        """
        self.skipped = Skipped()
        self._bytes_before = 0
        for path in self.files:
            count = 0
            try:
                for count, record in enumerate(self._read(path), start=1):  # noqa: B007
                    yield record
            except UnusableError as error:
                # A file that breaks off after some documents is one that somebody wants whole.
                required = not self.tolerant and (path in self.named or count > 0)
                self.skipped.add(str(path), error, required=required)
            self.separated |= count > 1
            self._bytes_before += path.stat().st_size if path.is_file() else 0

    def _read(self, path: Path) -> Iterator[Record]:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise cannot_be_read(error) from error
        with self._file:
            for record in read_records(path, self._file, self.layout):
                wanted = path in self.named or record.json_key is not None
                yield replace(record, required=wanted and not self.tolerant)

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents in order.

        Raises:
            DataError: If a file or a line that must be usable is not.
        """
        for record in self.records():
            try:
                yield record.document()
            except UnusableError as error:
                self.skipped.add(record.place, error, required=record.required)


def _walk(root: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in skipped)
        paths = (Path(folder, name) for name in sorted(names) if name[0] != ".")
        yield from (path for path in paths if path.is_file())  # reading a pipe would wait


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
