"""Which Megatron releases CAME is known to be exact with."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from megatron_came.megatron.errors import HostError

# The newest is what the host room is written for; what others have otherwise is in host/releases.
SUPPORTED = ("0.16", "0.17", "0.18", "0.19")


def check_version() -> str:
    """Return the version of the Megatron that is first on the search path.

    Raises:
        HostError: none is installed, or one that CAME has not been tested with.
    """
    try:
        version = str(importlib.import_module("megatron.core").__version__)
    except ImportError as error:
        raise HostError(
            f"--optimizer came needs Megatron, which cannot be imported ({error}): "
            "pip install megatron-core==0.19.2, or start the script of a Megatron-LM checkout."
        ) from error
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise HostError(
            f"--optimizer came does not know Megatron {version}: "
            f"use a release of {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}."
        )
    return version


def release() -> tuple[int, int]:
    """Return the release series of the Megatron that is first on the search path.

    Raises:
        HostError: as :func:`check_version`.
    """
    major, minor = check_version().split(".")[:2]
    return int(major), int(minor)


def has_training_loop() -> bool:
    """Whether ``megatron.training`` lies beside ``megatron.core``: wheels of 0.16 lack it."""
    core = importlib.util.find_spec("megatron.core")
    training = importlib.util.find_spec("megatron.training")
    if core is None or training is None or not core.origin or not training.origin:
        return False
    return Path(core.origin).parents[1] == Path(training.origin).parents[1]
