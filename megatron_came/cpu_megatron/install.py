"""Every name of Megatron's that is replaced on a machine without a GPU: by what, and why.

What stands in for parts of PyTorch is in ``devices.py`` and ``randomness.py``.
"""

from megatron_came.patching import table
from megatron_came.versions import since

_HELPERS = "megatron_came.versions:with_compiled_helpers"

# fmt: off
REPLACEMENTS = table("megatron_came.cpu_megatron", {
    "megatron.training.arguments": (
        ("add_megatron_arguments", "arguments:with_defaults", "defaults are a CPU's"),
        ("parse_args", "arguments:with_check", "what cannot work is refused"),
        ("validate_args", "arguments:with_check_and_attention", "also of a checkpoint's arguments"),
    ),
    "megatron.core.datasets.utils": (
        ("compile_helpers", _HELPERS, "the wheel has compiled helpers and no Makefile"),
    ),
    "megatron.legacy.fused_kernels": (
        ("load", "functions:nothing", "it compiles CUDA kernels of legacy models", ("0.16",)),
    ),
    "megatron.core.pipeline_parallel.schedules": (
        ("deallocate_output_tensor", "functions:nothing", "gloo may still read what was sent"),
        ("custom_backward", "functions:backward_of_kept", "so it is there in the backward pass"),
    ),
    "megatron.core.transformer.torch_norm": (
        ("WrappedTorchNorm.__new__", "parallel_layers:norms_of_all_kinds",
         "torch's norms do for sequence parallelism and --apply-layernorm-1p"),
    ),
    "megatron.core.transformer.dot_product_attention": (
        ("DotProductAttention.__init__", "parallel_layers:starting_alone",
         "unfused attention does for context parallelism"),
        ("DotProductAttention.forward", "parallel_layers:attending_to_all",
         "it sees the keys and values of all ranks"),
    ),
    "megatron.core.tensor_parallel.mappings": (
        ("_gather_along_first_dim", "parallel_layers:gathering_unlike",
         "gloo gathers no unlike sizes, which experts have"),
        ("_reduce_scatter_along_first_dim", "parallel_layers:scattering_unlike",
         "nor does it scatter them"),
    ),
    "megatron.core.transformer.moe.moe_utils": (
        ("maybe_move_tensor_to_cpu", "functions:to_numbers", "sizes become numbers here, too"),
        ("te_general_gemm", "functions:absent", "it is asked for, though it was not imported",
         ("0.16",), True),
    ),
    "megatron.core.models.bert.bert_layer_specs": (
        ("get_bert_layer_with_transformer_engine_spec", "functions:local_layers_of_bert",
         "pretrain_bert.py imports it and cannot start without"),
    ),
    "megatron.core.dist_checkpointing.strategies.async_utils": (
        ("PersistentAsyncCaller._get_process", "functions:forking",
         "the process that writes checkpoints has the stand-ins", since("0.17")),
    ),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        ("FileSystemWriterAsync.prepare_write_data", "functions:copying",
         "training does not change what is being written"),
    ),
    # torch's Adam, in place of Transformer Engine's and apex's.
    "megatron.core.optimizer.distrib_optimizer": (
        ("DistributedOptimizer.sharded_state_dict", "functions:with_state",
         "there is a state to be loaded"),
        ("DistributedOptimizer.load_state_dict", "functions:with_steps",
         "each parameter has its step count"),
        ("DistributedOptimizer._set_main_param_and_optimizer_states", "functions:without_step",
         "formats with and without a step are read"),
    ),
})
# fmt: on
