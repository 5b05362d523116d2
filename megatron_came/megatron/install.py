"""Every name of Megatron's that is replaced for CAME: by what, why, and in which releases.

Of one name, the later row is called first. What is replaced on a CPU is in
``cpu_megatron/install.py``, for memory in ``memory/__init__.py``.
"""

from collections.abc import Container

from megatron_came.patching import put_in_place, table
from megatron_came.versions import SUPPORTED, MegatronError, before, since
from megatron_came.voice import say_once

_HELPERS = "megatron_came.versions:with_compiled_helpers"

# fmt: off
REPLACEMENTS = table("megatron_came.megatron", {
    "megatron.core.optimizer": (
        ("get_megatron_optimizer", "builder:with_came", "CAME passes as Adam, if ranks agree",
         SUPPORTED, False, True),  # everywhere: a package's own may call it under this name
        ("_get_megatron_optimizer_based_on_param_groups", "builder:with_came_for_groups",
         "CAME is built where its configuration is given"),
    ),
    "megatron.core.optimizer.optimizer_config": (
        ("OptimizerConfig.__init__", "config:with_settings", "hosts hand CAME's settings to it"),
    ),
    "megatron.core.utils": (
        ("local_multi_tensor_l2_norm", "gradient_norms:in_fp32", "norms are not rounded to bf16"),
    ),
    "megatron.core.rerun_state_machine": (
        ("RerunStateMachine.should_run_forward_backward", "bad_numbers:counted",
         "what goes away when it is computed again is said so"),
        ("RerunStateMachine.validate_result", "bad_numbers:noted", "bad numbers are remembered"),
        ("RerunStateMachine.should_checkpoint_and_exit", "bad_numbers:ended",
         "all ranks end before the step, and nothing is saved"),
    ),
    "megatron.core.distributed.param_and_grad_buffer": (
        ("_ParamAndGradBucketGroup.check_grads", "bad_numbers:with_buckets",
         "a bad gradient is named by its parameter"),
    ),
    "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer": (
        ("_check_nan_in_grad", "bad_numbers:left_alone", "it ends one rank alone", ("0.19",)),
    ),
    "megatron.core.distributed.data_parallel_base": (
        ("_BaseDataParallel.finish_grad_sync", "compat.fsdp2:with_all_reduce",
         "FSDP2 ends in a TypeError otherwise", before("0.19")),
    ),
    "megatron.core.datasets.utils": (
        ("compile_helpers", _HELPERS, "the wheel has compiled helpers and no Makefile"),
    ),
    "megatron.core.dist_checkpointing.optimizer": (
        ("get_optim_param_to_id_map", "checkpoints.fsdp2:by_local_tensor",
         "FSDP2's parameters are found in the model's state"),
    ),
    "megatron.core.dist_checkpointing.serialization": (
        ("load", "checkpoints.tensors:with_shapes",
         "a host's checkpoint without CAME's state is refused"),
        ("load_common", "checkpoints.loading:agreed", "all ranks end where one cannot read",
         ("0.17", "0.18")),
        ("load_common_state_dict", "checkpoints.loading:agreed", "likewise", since("0.19")),
    ),
    "megatron.core.dist_checkpointing.strategies.common": (
        ("TorchCommonLoadStrategy.load_common", "checkpoints.loading:agreed", "likewise",
         ("0.16",)),
    ),
    "megatron.core.dist_checkpointing.strategies.torch": (
        ("TorchDistLoadShardedStrategy.load", "checkpoints.loading:agreed", "likewise"),
    ),
    "megatron.core.dist_checkpointing.strategies.async_utils": (
        ("PersistentAsyncCaller.async_loop", "checkpoints.workers:with_trainer",
         "the process that writes checkpoints ends with its trainer"),
    ),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        ("_get_write_results_queue", "checkpoints.workers:with_queue", "so does its queue's",
         ("0.16",)),
        ("get_write_results_queue", "checkpoints.workers:with_queue", "so does its queue's",
         since("0.17")),
    ),
    "megatron.training.arguments": (
        ("add_megatron_arguments", "arguments:with_flags", "--optimizer came and its flags exist"),
        ("validate_args", "arguments:with_checks", "CAME passes as Adam; misfits are refused"),
    ),
    "megatron.training.utils": (
        ("calc_params_l2_norm", "gradient_norms:of_all_rows",
         "--log-params-norm is of all ranks' rows with FSDP2"),
    ),
    "megatron.training.training": (
        ("get_megatron_optimizer_config", "config:with_came", "a configuration says: CAME"),
        ("get_optimizer_param_scheduler", "arguments:in_a_sentence",
         "its assertions end in a sentence"),
        ("setup_model_and_optimizer", "checkpoints.shifted:with_warning",
         "a run whose checkpoints Megatron shifts is warned"),
        ("setup_model_and_optimizer", "checkpoints.unwritten:looked_at_first",
         "a folder of --save that cannot be written is refused"),
        ("train_step", "bad_numbers:watched", "bad numbers of this iteration are looked for"),
        ("train_step", "diagnostics:logged", "figures of the step are logged"),
    ),
    "megatron.training.async_utils": (
        ("maybe_finalize_async_save", "checkpoints.unwritten:async_failures_said",
         "what cannot be written is said"),
    ),
    "megatron.training.checkpointing": (
        ("save_checkpoint", "checkpoints.digests.saving:with_digests", "digests are computed"),
        ("generate_state_dict", "checkpoints.digests.saving:with_record", "and saved"),
        ("generate_state_dict", "checkpoints.loading:asking_for_all",
         "--no-save-optim and --no-save-rng are not for what is loaded"),
        ("preprocess_fsdp_dtensor_state_dict", "checkpoints.tensors:with_names",
         "a checkpoint of Megatron-FSDP that does not fit is refused", ("0.19",)),
        ("load_checkpoint", "checkpoints.loading:with_sentences", "all is verified"),
        ("_load_base_checkpoint", "checkpoints.loading:with_checks",
         "a run that cannot resume as its flags say ends before it loads"),
    ),
})
# fmt: on


def install() -> None:
    """Make ``--optimizer came`` known to the Megatron that is first on the search path. Idempotent.

    Raises:
        MegatronError: Megatron is missing, of a release that is not supported, or lacks what is to
            be replaced.
    """
    put_in_place(REPLACEMENTS)


def install_in(modules: Container[str]) -> bool:
    """Do so in these modules alone, which have just been imported by somebody else.

    Returns:
        Whether it could be done; where not, that is said, and Megatron is left to others.
    """
    try:
        put_in_place(row for row in REPLACEMENTS if row.module in modules)
    except MegatronError as error:
        say_once(str(error))
        return False
    return True
