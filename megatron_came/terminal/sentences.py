"""How a command that cannot go on ends: with one sentence, which names a remedy."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class CommandError(Exception):
    """Why a command cannot go on; the message is one sentence that names it and the remedy."""


def reason_of(error: Exception) -> str:
    """What the system says of a file, or a library of what it was given, to stand in brackets."""
    return (getattr(error, "strerror", None) or str(error) or "unknown error").lower()


def status_of(
    work: Callable[[], int | None],
    prefix: str,
    *others: type[Exception],
    status: int = 2,
    remedy: str | None = None,
    place: Path | None = None,
) -> int:
    """Do a command's work; return its exit status, and say on standard error why it cannot go on.

    Args:
        work: returns the exit status; None is 0.
        prefix: of the sentence, such as the command's name.
        others: exceptions whose messages are sentences, beside ``CommandError``.
        status: where it cannot go on.
        remedy: for a file that cannot be used; None lets such errors through.
        place: what cannot be used where the error does not say it.
    """
    told: tuple[type[Exception], ...] = (CommandError, *others)
    try:
        return work() or 0
    except BrokenPipeError:  # of who reads what is printed
        raise
    except told as error:
        problem = str(error)
    except OSError as error:
        if remedy is None:
            raise
        if error.filename is None:
            sys.stdout.flush()  # raises if there is no room for what is printed: no file is wrong
        name = error.filename or place or "A file"
        problem = f"{name} cannot be used ({reason_of(error)}): {remedy}."
    print(prefix + problem, file=sys.stderr)
    return status


@contextmanager
def writing(file: Path, flag: str) -> Iterator[None]:
    """Turn what goes wrong with a file that a flag names into a sentence.

    Raises:
        CommandError: it cannot be written, or not in the format of its name.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{flag} {file} cannot be written ({reason_of(error)}): name another file."
        ) from error


def require(package: str, what: str) -> None:
    """Make sure that a package is installed.

    Raises:
        CommandError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise CommandError(
            f"The package {package}, which {what} needs, is not installed: run"
            f" pip install {package}."
        )
