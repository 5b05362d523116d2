"""Putting the pieces of the host room in place."""

from __future__ import annotations

from megatron_came.megatron.versions import check_version, has_training_loop


def install() -> None:
    """Make ``--optimizer came`` known to the Megatron that is first on the search path. Idempotent.

    Raises:
        HostError: Megatron is missing, of a release that is not supported, or lacks what is to
            be replaced.
    """
    check_version()
    from megatron_came.megatron import builder, gradient_norms
    from megatron_came.megatron.checkpoints import workers

    builder.install()
    gradient_norms.install()
    workers.install()
    if not has_training_loop():
        return
    from megatron_came import memory
    from megatron_came.megatron import arguments, bad_numbers, config
    from megatron_came.megatron.checkpoints import resume, resumed_buckets, shifted
    from megatron_came.megatron.checkpoints.digests import loading, saving

    config.install()
    arguments.install()
    resumed_buckets.install()  # its sentence is the better one, so it goes first
    shifted.install()
    saving.install()
    memory.install()
    resume.install()
    loading.install()
    bad_numbers.install()
