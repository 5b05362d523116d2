"""What is wrong with a checkpoint, in sentences for the user."""

import reprlib

REMEDY = "take the file from a copy, or another iteration (--ckpt-step)."


class CheckpointError(Exception):
    """A checkpoint, or a file of one, cannot be read; the message says which and what to do."""


class NoCheckpointError(CheckpointError):
    """There is none where one was named."""


class ForeignClassError(CheckpointError):
    """A pickle names a class or function that Megatron does not write."""


def cannot_be_read(path: object, reason: object) -> CheckpointError:
    """The error for a file that is truncated, damaged or something else altogether."""
    # The reason may quote the file, at any length.
    said = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]
    return CheckpointError(
        f"{path} cannot be read ({said}): it is truncated, damaged or not a checkpoint's; {REMEDY}"
    )


def printable(text: str) -> str:
    """What stands in a file, without anything that a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def shown(value: object) -> str:
    """What stands in a file, cut short: all of it may be endless."""
    try:
        return printable(reprlib.repr(value))[:40]
    except ValueError:  # Python prints no number of more than some thousand digits
        return "a number of thousands of digits"
