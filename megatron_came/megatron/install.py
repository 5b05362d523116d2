"""Putting the pieces of the host room in place."""

from __future__ import annotations

from megatron_came.megatron.patching import wrap
from megatron_came.megatron.versions import check_version, has_training_loop


def install() -> None:
    """Make ``--optimizer came`` known to the Megatron that is first on the search path. Idempotent.

    Raises:
        HostError: Megatron is missing, of a release that is not supported, or lacks what is to
            be replaced.
    """
    check_version()
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    from megatron_came.megatron import builder, gradient_norms
    from megatron_came.megatron.checkpoints import workers

    builder.install()
    gradient_norms.install()
    caller = async_utils.PersistentAsyncCaller
    if caller.async_loop is not workers.loop:
        caller.async_loop = staticmethod(workers.loop)
    names = ("get_write_results_queue", "_get_write_results_queue")  # the latter before 0.17
    name = next((name for name in names if hasattr(filesystem_async, name)), names[0])
    wrap(filesystem_async.__name__, name, workers.with_queue)
    if not has_training_loop():
        return
    from megatron_came import memory
    from megatron_came.megatron import arguments, bad_numbers, config
    from megatron_came.megatron.checkpoints import loading, shifted
    from megatron_came.megatron.checkpoints.digests import loading as verifying
    from megatron_came.megatron.checkpoints.digests import saving

    config.install()
    arguments.install()
    wrap("megatron.training.training", "setup_model_and_optimizer", shifted.with_warning)
    checkpointing = "megatron.training.checkpointing"
    wrap(checkpointing, "save_checkpoint", saving.with_digests)
    wrap(checkpointing, "generate_state_dict", saving.with_record)
    memory.install()
    wrap(checkpointing, "load_checkpoint", loading.with_sentences)
    wrap(checkpointing, "_load_base_checkpoint", loading.with_checks)
    wrap(checkpointing, "load_checkpoint", verifying.verified)
    bad_numbers.install()
