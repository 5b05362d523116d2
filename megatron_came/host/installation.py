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
    from megatron_came.host import building, checkpoint_workers, gradient_norms

    building.install()
    gradient_norms.install()
    checkpoint_workers.install()
    if not has_training_loop():
        return
    from megatron_came.host import (
        arguments,
        bad_numbers,
        config,
        memory,
        resumed_buckets,
        resuming,
        shifted_checkpoints,
    )
    from megatron_came.host.digests import loading, saving

    config.install()
    arguments.install()
    resumed_buckets.install()  # its sentence is the better one, so it goes first
    shifted_checkpoints.install()
    saving.install()
    memory.install()
    resuming.install()
    loading.install()
    bad_numbers.install()
