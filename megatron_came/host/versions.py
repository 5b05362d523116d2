"""Which Megatron releases CAME is known to be exact with."""

from __future__ import annotations

import importlib

from megatron_came.host.errors import HostError

SUPPORTED = ("0.19",)


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
            f"use a release of {' or '.join(SUPPORTED)}.x."
        )
    return version
