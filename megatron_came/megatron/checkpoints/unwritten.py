"""Checkpoints that cannot be written: where ``--save`` names no folder for them, or one is full."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.megatron.run import run_args
from megatron_came.patching import Function
from megatron_came.voice import end_if, is_of_lost_rank, rank, stop

# What torch.save says, without a reason, where a file cannot be written.
_OF_FILES = ("inline_container.cc", "iostream error")


def folder_problem(args: Any) -> str | None:
    """Say in one sentence that nothing can be written where ``--save`` says, or None."""
    if args.save is None or "://" in str(args.save) or getattr(args, "skip_train", False):
        return None  # nothing is saved, or in an object store
    folder = place = Path(args.save).absolute()
    while not os.path.exists(place):  # Path's raises where it may not look
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return None
    what = "cannot be written by this run" if place.is_dir() else "is no folder"
    where = "" if place == folder else f", since {place}"
    return f"--save {args.save}{where} {what}: name another folder, or have it made writable."


def looked_at_first(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Refuse a folder that rank 0, which always writes, cannot write to, before training."""
    # With any optimizer: that all ranks have one is not known yet.
    end_if(folder_problem(run_args()) if rank() == 0 else None)
    return original(*args, **kwargs)


@contextlib.contextmanager
def failures_said(what: str, folder: Any) -> Iterator[None]:
    """End in a sentence where something cannot be written to the folder of ``--save`` meanwhile.

    Raises:
        SystemExit: it cannot.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        if is_of_lost_rank(error):
            stop(f"another rank ended while {what} was saved, and says why.", error)
        reason = _reason(error)
        if reason is None:
            raise
        with contextlib.suppress(OSError):  # the folder may not be there
            reason += f"; {shutil.disk_usage(str(folder)).free >> 20} MiB are free there"
        stop(
            f"{what} cannot be saved in {folder} ({reason}): make room there, or name another "
            "folder with --save; what was saved before is as it was, and is resumed from with "
            f"--load {folder}.",
            error,
        )


def async_failures_said(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Say so of what ``--async-save`` is writing."""
    settings = run_args()
    if settings.optimizer != "came":
        return original(*args, **kwargs)
    with failures_said("an asynchronous checkpoint", settings.save):
        return original(*args, **kwargs)


def _reason(error: BaseException | None) -> str | None:
    """Say why a file cannot be written; None of an error that is none of a file."""
    if isinstance(error, CheckpointException):  # all ranks', which the first alone has in words
        found = next((each for each, _ in error.failures.values()), None)
        if found is None or "Worker failure" in str(found):  # which a thread has said
            return "see the lines above"
        return _reason(found) or f"{type(found).__name__}: {found}".splitlines()[0]
    while error is not None:
        # A connection is lost to another rank, and to no file.
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            return f"{error.strerror}: {error.filename}" if error.filename else str(error)
        if isinstance(error, RuntimeError) and any(each in str(error) for each in _OF_FILES):
            return "a file cannot be written"
        error = error.__cause__ or error.__context__
    return None
