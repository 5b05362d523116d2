"""Every name of Megatron's that is replaced for CAME: by what, why, and in which releases.

Of one name, the later row is called first. The CPU's are in ``cpu_megatron/install.py``, those of
memory in ``memory/__init__.py``.
"""

from __future__ import annotations

from megatron_came.patching import Replacement, put_in_place
from megatron_came.versions import since

_HERE = "megatron_came.megatron"
_CHECKPOINTS = f"{_HERE}.checkpoints"
_LOADING = "megatron.training.checkpointing"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_RERUN = "megatron.core.rerun_state_machine:RerunStateMachine"

REPLACEMENTS = (
    # Building the optimizer.
    Replacement(
        "megatron.core.optimizer:get_megatron_optimizer",
        f"{_HERE}.builder:with_came",
        "ranks agree on one optimizer, and CAME takes the path of Adam to its builder",
    ),
    Replacement(
        "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
        f"{_HERE}.builder:with_came_for_groups",
        "a configuration of CAME's type builds CAME",
    ),
    Replacement(
        "megatron.training.training:get_megatron_optimizer_config",
        f"{_HERE}.config:with_came",
        "--optimizer came makes a configuration of CAME's type",
    ),
    # The command line.
    Replacement(
        "megatron.training.arguments:add_megatron_arguments",
        f"{_HERE}.arguments:with_flags",
        "--optimizer has the choice came, and CAME its flags",
    ),
    Replacement(
        "megatron.training.arguments:validate_args",
        f"{_HERE}.arguments:with_checks",
        "what does not go with CAME is refused, and its name is not taken for a layer-wise one",
    ),
    # The training loop.
    Replacement(
        "megatron.core.utils:local_multi_tensor_l2_norm",
        f"{_HERE}.gradient_norms:in_fp32",
        "the norm of gradients in 16 bits is not rounded to 16 bits",
    ),
    Replacement(
        "megatron.training.training:train_step",
        f"{_HERE}.bad_numbers:watched",
        "a NaN or an infinity is looked for in this iteration",
    ),
    Replacement(
        f"{_RERUN}.validate_result",
        f"{_HERE}.bad_numbers:noted",
        "what is wrong with a loss or a gradient is remembered",
    ),
    Replacement(
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.check_grads",
        f"{_HERE}.bad_numbers:with_buckets",
        "a bad gradient is named by its parameter",
    ),
    Replacement(
        f"{_RERUN}.should_checkpoint_and_exit",
        f"{_HERE}.bad_numbers:ended",
        "all ranks end with one sentence before the optimizer's step",
    ),
    Replacement(
        "megatron.core.datasets.utils:compile_helpers",
        "megatron_came.versions:with_compiled_helpers",
        "megatron-core's wheel has compiled helpers and no Makefile",
    ),
    # Checkpoints.
    Replacement(
        f"{_STRATEGIES}.async_utils:PersistentAsyncCaller.async_loop",
        f"{_CHECKPOINTS}.workers:with_trainer",
        "the process that writes checkpoints ends with its trainer",
    ),
    *(
        Replacement(
            f"{_STRATEGIES}.filesystem_async:{name}",
            f"{_CHECKPOINTS}.workers:with_queue",
            "the process of that one's queue ends with its trainer",
            releases,
        )
        for name, releases in (
            ("_get_write_results_queue", ("0.16",)),
            ("get_write_results_queue", since("0.17")),
        )
    ),
    Replacement(
        f"{_LOADING}:save_checkpoint",
        f"{_CHECKPOINTS}.digests.saving:with_digests",
        "digests of what is saved are computed",
    ),
    Replacement(
        f"{_LOADING}:generate_state_dict",
        f"{_CHECKPOINTS}.digests.saving:with_record",
        "digests are saved",
    ),
    Replacement(
        "megatron.training.training:setup_model_and_optimizer",
        f"{_CHECKPOINTS}.shifted:with_warning",
        "checkpoints of other optimizers that Megatron saves shifted are warned of",
    ),
    Replacement(
        f"{_LOADING}:_load_base_checkpoint",
        f"{_CHECKPOINTS}.resumed_buckets:with_reason",
        "a load that fails because of other buckets says so",
    ),
    Replacement(
        f"{_LOADING}:_load_base_checkpoint",
        f"{_CHECKPOINTS}.shifted:with_note",
        "a checkpoint that may be shifted is remembered",
    ),
    Replacement(
        f"{_LOADING}:load_checkpoint",
        f"{_CHECKPOINTS}.resume:with_sentences",
        "a load that fails ends all ranks with one sentence",
    ),
    Replacement(
        f"{_LOADING}:_load_base_checkpoint",
        f"{_CHECKPOINTS}.resume:with_checks",
        "a run that cannot resume as its flags say ends before anything is loaded",
    ),
    Replacement(
        f"{_LOADING}:load_checkpoint",
        f"{_CHECKPOINTS}.digests.loading:verified",
        "what was loaded is compared with the digests",
    ),
    Replacement(
        f"{_LOADING}:_load_base_checkpoint",
        f"{_CHECKPOINTS}.digests.loading:noted",
        "what was read is added up",
    ),
)


def install() -> None:
    """Make ``--optimizer came`` known to the Megatron that is first on the search path. Idempotent.

    Raises:
        MegatronError: Megatron is missing, of a release that is not supported, or lacks what is to
            be replaced.
    """
    put_in_place(REPLACEMENTS)
