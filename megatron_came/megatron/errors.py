"""Errors whose messages are sentences for the user; launchers show them without a stack trace."""

import re
import traceback

from megatron_came.rules import flag_of

# What Megatron's validation says of a flag, in words or by its source.
_MISSING = re.compile(r"(\w+) argument is None|assert args\.(\w+) is not None$")
_TOO_MUCH = re.compile(r"assert args\.(\w+) is None$")


class UnsupportedError(ValueError):
    """A model or a setting that CAME is not known to be exact with."""


def words_of(error: BaseException) -> str:
    """What an error of Megatron's says, in one line; nothing where it speaks of classes alone."""
    # Megatron adds where it was, one module within the other.
    said = re.sub(r"( when instantiating \w+)+$", "", " ".join(str(error).split()))
    said = said.rstrip(".,")
    # Class names (camel case, or acronyms) mean nothing to who typed flags.
    names_classes = re.search(r"[a-z][A-Z]|[A-Z]{2}[a-z]{2}", said) and "--" not in said
    return "" if names_classes else said


def refused_by_megatron(error: BaseException) -> str:
    """Say in a sentence why Megatron's validation refuses flags; many assertions have no words."""
    said, frames = words_of(error), traceback.extract_tb(error.__traceback__)
    source = (frames[-1].line if frames and isinstance(error, AssertionError) else "") or ""
    if missing := _MISSING.fullmatch(said or source):
        return f"Megatron needs {flag_of(missing[1] or missing[2])}: add it to the flags."
    if too_much := _TOO_MUCH.fullmatch(said or source):
        return f"Megatron does not take {flag_of(too_much[1])} with the others: leave it out."
    said = said or (f"Megatron stops at {source!r}" if source else "Megatron stops without a word")
    return f"these flags are not a launch of Megatron: {said}."
