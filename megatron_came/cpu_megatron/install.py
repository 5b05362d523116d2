"""Every name of Megatron's that is replaced on a machine without a GPU: by what, and why.

What stands in for parts of PyTorch is in ``devices.py`` and ``randomness.py``.
"""

from __future__ import annotations

from megatron_came.patching import Replacement, put_in_place
from megatron_came.versions import since

_HERE = "megatron_came.cpu_megatron"
_ARGUMENTS = "megatron.training.arguments"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_EXPERTS = "megatron.core.transformer.moe.moe_utils"
_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

REPLACEMENTS = (
    # The command line.
    Replacement(
        f"{_ARGUMENTS}:add_megatron_arguments",
        f"{_HERE}.arguments:with_defaults",
        "flags have defaults that work on a CPU",
    ),
    Replacement(
        f"{_ARGUMENTS}:parse_args",
        f"{_HERE}.arguments:with_check",
        "what cannot work on a CPU is refused",
    ),
    Replacement(
        f"{_ARGUMENTS}:validate_args",
        f"{_HERE}.arguments:with_check_and_attention",
        "so is what a checkpoint's arguments ask for, and all attention is the unfused one",
    ),
    # The training loop.
    Replacement(
        "megatron.core.datasets.utils:compile_helpers",
        "megatron_came.versions:with_compiled_helpers",
        "megatron-core's wheel has compiled helpers and no Makefile",
    ),
    Replacement(
        "megatron.legacy.fused_kernels:load",
        f"{_HERE}.functions:nothing",
        "it compiles CUDA kernels that legacy models alone use",
        releases=("0.16",),
    ),
    Replacement(
        f"{_SCHEDULES}:deallocate_output_tensor",
        f"{_HERE}.functions:nothing",
        "gloo may still be reading what a pipeline stage has sent",
    ),
    Replacement(
        f"{_SCHEDULES}:custom_backward",
        f"{_HERE}.functions:backward_of_kept",
        "so what was sent is kept until the backward pass",
    ),
    # Layers.
    Replacement(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        f"{_HERE}.parallel_layers:norms_of_all_kinds",
        "torch's norms do for sequence parallelism and --apply-layernorm-1p",
    ),
    Replacement(
        f"{_ATTENTION}.__init__",
        f"{_HERE}.parallel_layers:starting_alone",
        "the unfused attention does for context parallelism",
    ),
    Replacement(
        f"{_ATTENTION}.forward",
        f"{_HERE}.parallel_layers:attending_to_all",
        "it sees the keys and values of all context-parallel ranks",
    ),
    Replacement(
        f"{_MAPPINGS}:_gather_along_first_dim",
        f"{_HERE}.parallel_layers:gathering_unlike",
        "gloo gathers no tensors of unlike sizes, as tensor-parallel ranks of an expert hold them",
    ),
    Replacement(
        f"{_MAPPINGS}:_reduce_scatter_along_first_dim",
        f"{_HERE}.parallel_layers:scattering_unlike",
        "nor does it scatter them",
    ),
    Replacement(
        f"{_EXPERTS}:maybe_move_tensor_to_cpu",
        f"{_HERE}.functions:to_numbers",
        "sizes of an all-to-all become numbers only on the way from a GPU",
    ),
    Replacement(
        f"{_EXPERTS}:te_general_gemm",
        f"{_HERE}.functions:absent",
        "the router asks for a function that could not be imported",
        releases=("0.16",),
        adds=True,
    ),
    # Checkpoints.
    Replacement(
        f"{_STRATEGIES}.async_utils:PersistentAsyncCaller._get_process",
        f"{_HERE}.functions:forking",
        "the process that writes checkpoints has the stand-ins",
        releases=since("0.17"),
    ),
    Replacement(
        f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync.prepare_write_data",
        f"{_HERE}.functions:copying",
        "training does not change what is being written",
    ),
    # torch's Adam, which stands for Transformer Engine's and apex's.
    Replacement(
        f"{_OPTIMIZER}.sharded_state_dict",
        f"{_HERE}.torch_adam:with_state",
        "torch's Adam has the state that is to be loaded",
    ),
    Replacement(
        f"{_OPTIMIZER}.load_state_dict",
        f"{_HERE}.torch_adam:with_steps",
        "each parameter has a step count of its own",
    ),
    Replacement(
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        f"{_HERE}.torch_adam:without_step",
        "formats with and without a step are read",
    ),
)


def install() -> None:
    """Put the stand-ins for Megatron's functions in place, for good.

    Raises:
        MegatronError: Megatron is missing, of a release that is not supported, or lacks a name.
    """
    put_in_place(REPLACEMENTS)
