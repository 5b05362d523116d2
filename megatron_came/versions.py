"""Which Megatron is installed, and which releases are known to be fit for use."""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from pathlib import Path

# All code is written for the newest; what others have otherwise is in megatron/compat.
SUPPORTED = ("0.16", "0.17", "0.18", "0.19", "0.20")
# Of these, the one that is not out yet.
IN_DEVELOPMENT = "0.20"


class MegatronError(RuntimeError):
    """The installed Megatron is not one that this package fits."""


def check_version() -> str:
    """Return the version of the Megatron that is first on the search path.

    Raises:
        MegatronError: none is installed, or one that CAME has not been tested with.
    """
    handlers = [*logging.root.handlers]
    try:
        # Of a module without imports: megatron.core may be in the middle of its own.
        version = str(importlib.import_module("megatron.core.package_info").__version__)
    except ImportError as error:
        raise MegatronError(
            f"--optimizer came needs Megatron, which cannot be imported ({error}): "
            "pip install megatron-core==0.19.2, or start the script of a Megatron-LM checkout."
        ) from error
    # Where emerging-optimizers is installed, core's import has configured logging, by absl, which
    # Megatron's training loop would find done.
    logging.root.handlers[:] = handlers
    if _series(version) not in SUPPORTED:
        raise MegatronError(
            f"--optimizer came does not know Megatron {version}: "
            f"use a release of {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}."
        )
    return version


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def release() -> tuple[int, int]:
    """Return the release series of the Megatron that is first on the search path.

    Raises:
        MegatronError: as :func:`check_version`.
    """
    major, minor = _series(check_version()).split(".")
    return int(major), int(minor)


def since(first: str) -> tuple[str, ...]:
    """Return the supported series from one on."""
    return SUPPORTED[SUPPORTED.index(first) :]


def before(newer: str) -> tuple[str, ...]:
    """Return the supported series before one."""
    return SUPPORTED[: SUPPORTED.index(newer)]


def has_training_loop() -> bool:
    """Whether ``megatron.training`` lies beside ``megatron.core``: wheels of 0.16 lack it."""
    core = importlib.util.find_spec("megatron.core")
    training = importlib.util.find_spec("megatron.training")
    if core is None or training is None or not core.origin or not training.origin:
        return False
    # A checkout's core may be before an installed wheel, which has another loop.
    return Path(core.origin).parents[1] == Path(training.origin).parents[1]


def with_compiled_helpers(compile_helpers: Callable[[], None]) -> None:
    """Let Megatron's data sets do with their compiled helpers, where there is no Makefile.

    megatron-core's wheel brings the helpers and no Makefile; its training loop runs ``make`` all
    the same, and stops.
    """
    has_makefile = Path(inspect.getfile(compile_helpers)).with_name("Makefile").exists()
    if has_makefile or not importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        compile_helpers()
