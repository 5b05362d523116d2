"""Documents of text, from text files, folders and JSON Lines."""

import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from megatron_came.data.folders import (
    Skipped,
    UnusableError,
    cannot_be_read,
    file_size,
    is_folder,
    walk,
)
from megatron_came.data.records import Layout, Record, read_records
from megatron_came.terminal.sentences import CommandError

_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
_LIBRARY_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings"}


@dataclass
class Corpus:
    """The documents of some files, read in order as they are iterated over."""

    files: list[Path]
    # Those a person named one by one. A fault in one of these is an error; other files are skipped
    # and counted. A faulty line of JSON Lines is an error in any file.
    named: frozenset[Path] = frozenset()
    layout: Layout = field(default_factory=Layout)
    tolerant: bool = False  # whether nothing is an error: what is faulty is skipped and counted
    left_out: Skipped = field(default_factory=Skipped)  # what is no file to read, in folders
    skipped: Skipped = field(default_factory=Skipped)  # complete once iterated over
    separated: bool = False  # whether a separator, or an end of line, has cut any file in two yet
    _bytes_before: int = field(default=0, repr=False)
    _file: BinaryIO | None = field(default=None, repr=False)

    @classmethod
    def from_paths(
        cls, paths: Iterable[Path], layout: Layout | None = None, *, tolerant: bool = False
    ) -> "Corpus":
        """Take files as they are, and folders with everything below them; see :func:`walk`.

        Raises:
            CommandError: If a path cannot be read, or there is no file at all.
        """
        files: list[Path] = []
        named: set[Path] = set()
        left_out = Skipped()
        for path in paths:
            try:
                if is_folder(path, pipes=True):
                    files.extend(walk(path, left_out, required=not tolerant))
                else:
                    files.append(path)
                    named.add(path)
            except UnusableError as error:
                left_out.add(str(path), error, required=not tolerant)
        if not files:
            said = "".join(f" {line}" for line in left_out.lines())
            raise CommandError(f"There is no file in what was named: name some with text.{said}")
        return cls(files, frozenset(named), layout or Layout(), tolerant, left_out)

    @classmethod
    def python_library(cls) -> "Corpus":
        """Take the texts of the Python library, without its tests and character tables."""
        root = Path(sysconfig.get_path("stdlib"))
        below = walk(root, Skipped(), ignored=_LIBRARY_SKIPPED)
        files = [path for path in below if path.suffix in _LIBRARY_SUFFIXES]
        if not files:
            raise CommandError(f"{root} holds no Python sources: name files of your own instead.")
        return cls(files)

    @property
    def size(self) -> int:
        """Bytes in all files, as they lie on the disk."""
        return sum(file_size(path) or 0 for path in self.files)

    @property
    def pipes(self) -> list[Path]:
        """Files of unknown size that can be read once only."""
        return [path for path in self.files if file_size(path) is None]

    @property
    def position(self) -> int:
        """How many of these bytes the present iteration has read so far."""
        file = self._file
        readable = file is not None and not file.closed and file.seekable()
        return self._bytes_before + (file.tell() if file is not None and readable else 0)

    def records(self) -> Iterator[Record]:
        """Yield the documents in order, not decoded; a CommandError if one must be usable."""
        self.skipped = Skipped()
        self.skipped.update(self.left_out)
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
            self._bytes_before += file_size(path) or 0

    def _read(self, path: Path) -> Iterator[Record]:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise cannot_be_read(error) from error
        with self._file:
            for record in read_records(path, self._file, self.layout):
                wanted = path in self.named or record.json_key is not None
                yield replace(record, required=wanted and not self.tolerant)

    def __iter__(self) -> Iterator[str]:
        """Yield the texts in order; a CommandError for one that must be usable and is not."""
        for record in self.records():
            try:
                yield record.text()
            except UnusableError as error:
                self.skipped.add(record.where, error, required=record.required)
