"""Errors whose messages are sentences for the user; launchers show them without a stack trace."""

from __future__ import annotations

import re
import traceback

from megatron_came.rules import flag_of

# What Megatron's validation says of a required flag, in words or by its source.
_MISSING = re.compile(r"(\w+) argument is None|assert args\.(\w+) is not None$")


class UnsupportedError(ValueError):
    """A model or a setting that CAME is not known to be exact with."""


def refused_by_megatron(error: BaseException) -> str:
    """Say in a sentence why Megatron's validation refuses flags; many assertions have no words."""
    said = " ".join(str(error).split()).rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    source = frames[-1].line if frames and isinstance(error, AssertionError) else ""
    if missing := _MISSING.fullmatch(said or source or ""):
        return f"Megatron needs {flag_of(missing[1] or missing[2])}: add it to the flags."
    said = said or (f"Megatron stops at {source!r}" if source else "Megatron stops without a word")
    return f"these flags are not a launch of Megatron: {said}."
