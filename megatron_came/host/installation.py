"""Putting the pieces of the host room in place."""

from __future__ import annotations

from megatron_came.host.versions import check_version, has_training_loop


def install() -> None:
    """Make ``--optimizer came`` known to the Megatron that is first on the search path. Idempotent.

    Raises:
        HostError: Megatron is missing, of a release that is not supported, or lacks what is to
            be replaced.
    """
    check_version()
    from megatron_came.host import building, gradient_norms

    building.install()
    gradient_norms.install()
    if not has_training_loop():
        return
    from megatron_came.host import arguments, checkpoint_refusals, config, memory

    config.install()
    arguments.install()
    checkpoint_refusals.install()
    memory.install()
