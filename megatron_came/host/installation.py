"""Putting the pieces of the host room in place."""

from __future__ import annotations

from megatron_came.host.versions import check_version


def install() -> None:
    """Make ``--optimizer came`` known to the Megatron that is first on the search path. Idempotent.

    Raises:
        HostError: Megatron is missing, of a release that is not supported, or lacks what is to
            be replaced.
    """
    check_version()
    from megatron_came.host import arguments, building, checkpoint_refusals, memory

    building.install()
    arguments.install()
    checkpoint_refusals.install()
    memory.install()
