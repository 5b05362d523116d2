"""The files in folders, and what is there that is no file."""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_came.terminal.sentences import CommandError, reason_of

_NOT_READ = {
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}
_ANOTHER = "name a text file or a folder of them"


class UnusableError(Exception):
    """Why a file or a document cannot be used ("is empty"), and what to do about it.

    Whether that is an error, or the document is left out and counted, is for others to decide.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)  # both, so that workers can send it to their parent
        self.reason = reason
        self.remedy = remedy


@dataclass
class Skipped:
    """How many files, folders and lines were left out, and the first of them, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, error: UnusableError, *, required: bool = False) -> None:
        """Count a file, folder or line that cannot be used; a CommandError if it is required."""
        if required:
            raise CommandError(f"{where} {error.reason}: {error.remedy}.") from error
        self.counts[error.reason] += 1
        self.examples.setdefault(error.reason, where.rstrip(","))

    def update(self, other: "Skipped") -> None:
        """Add what was left out elsewhere, later."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}

    def lines(self) -> list[str]:
        """Say a sentence for each reason."""
        return [
            f"Left out {self.examples[reason]}, which {reason}."
            if count == 1
            else f"Left out {count:,}, each of which {reason}; the first: {self.examples[reason]}."
            for reason, count in self.counts.items()
        ]


def cannot_be_read(error: OSError) -> UnusableError:
    """Turn what the system says of a file or a folder into a reason."""
    return UnusableError(
        f"cannot be read ({reason_of(error)})", "make it one that you may read, or name another one"
    )


def walk(
    root: Path, left_out: Skipped, *, required: bool = False, ignored: Collection[str] = ()
) -> Iterator[Path]:
    """Yield the files of a folder, then those of the folders in it, by name.

    Links to folders are followed; each folder is read once, so that links cannot lead in circles.
    Names that begin with a dot are left out, as are the ``ignored`` ones. What is there and cannot
    be read is counted in ``left_out``.

    Raises:
        CommandError: If the folder itself is ``required`` and cannot be read.
    """

    def fail(error: OSError) -> None:
        is_root = error.filename == str(root)
        left_out.add(error.filename, cannot_be_read(error), required=required and is_root)

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            left_out.add(folder, UnusableError("is a folder read under another name", ""))
            folders.clear()
            continue
        seen.add(identity)
        for names in (folders, files):  # in place: it decides what is walked, and in which order
            names[:] = sorted(name for name in names if name[0] != "." and name not in ignored)
        for path in (Path(folder, name) for name in files):
            try:
                if not is_folder(path):
                    yield path
            except UnusableError as error:
                left_out.add(str(path), error)


def is_folder(path: Path, *, pipes: bool = False) -> bool:
    """Whether a path is a folder, not a file; an UnusableError if it is neither.

    With ``pipes`` a pipe does as a file: reading one waits for whoever writes into it.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UnusableError("is a link to nothing", "mend it, or name a file") from error
        raise UnusableError("does not exist", _ANOTHER) from error
    except OSError as error:
        raise cannot_be_read(error) from error
    if kind in _NOT_READ and not (pipes and kind == stat.S_IFIFO):
        raise UnusableError(_NOT_READ[kind], _ANOTHER)
    return kind == stat.S_IFDIR


def file_size(path: Path) -> int | None:
    """Return the bytes of a regular file; 0 of one that cannot be read, None of a pipe."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None
