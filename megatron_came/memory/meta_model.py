"""The modules of a pipeline stage, built by Megatron without memory, GPU or other processes."""

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_came.megatron import parameter_rules
from megatron_came.megatron.errors import UnsupportedError, words_of
from megatron_came.memory.grid import Grid
from megatron_came.memory.model_kinds import BERT, build_function
from megatron_came.memory.stand_ins import nowhere, process_groups

# What decides about kernels, memory of activations or communication, but not about the shapes of
# parameters; these values need no GPU, Transformer Engine or process groups.
_OFF = """
    perform_initialization use_cpu_initialization sequence_parallel tp_comm_overlap
    gradient_accumulation_fusion apply_rope_fusion masked_softmax_fusion bias_gelu_fusion
    bias_swiglu_fusion bias_dropout_fusion fused_residual_rmsnorm cross_entropy_loss_fusion
    moe_grouped_gemm moe_permute_fusion moe_router_fusion moe_shared_expert_overlap
    overlap_moe_expert_parallel_comm delay_wgrad_compute use_te_rng_tracker
    distribute_saved_activations cpu_offloading fine_grained_activation_offloading
    batch_invariant_mode moe_enable_deepep moe_layer_recompute moe_paged_stash fp8_output_proj
    layernorm_zero_centered_gamma moe_router_padding_for_fp8 overlap_p2p_comm_warmup_flush
    moe_router_padding_for_quantization defer_embedding_wgrad_compute
    overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
"""
_UNSET = """
    hierarchical_context_parallel_sizes fp8 fp4 recompute_granularity recompute_method
    recompute_num_layers recompute_modules inference_cuda_graph_scope cuda_graph_modules
    moe_expert_rank_capacity_factor symmetric_ar_type
"""
_ANYWHERE: dict[str, object] = {
    **dict.fromkeys(_OFF.split(), False),
    **dict.fromkeys(_UNSET.split()),
    "transformer_impl": "local",
    "attention_backend": AttnBackend.auto,
    "init_model_with_meta_device": True,
    "context_parallel_size": 1,
    "no_persist_layer_norm": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_flex_dispatcher_backend": "deepep",
    "cuda_graph_impl": "none",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One model chunk of a pipeline stage; without virtual stages, all of it."""

    # Its parameters, on the meta device, with Megatron's marks, in Megatron's order.
    params: tuple[torch.nn.Parameter, ...]
    dense_layers: int  # number of transformer layers without experts
    expert_layers: int  # number of those with experts
    embeds: bool  # it holds the embeddings
    predicts: bool  # it holds the output layer
    model: torch.nn.Module  # what these are of, on the meta device

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return self.dense_layers + self.expert_layers


def build_stage(args: argparse.Namespace, grid: Grid, stage: int) -> list[Chunk]:
    """Build the model chunks of a pipeline stage as Megatron would.

    Raises:
        UnsupportedError: not a GPT, BERT or T5 model, or one that Megatron cannot build this
            way; the message says what it lacks.
    """
    from megatron.training.models.dist_utils import build_virtual_pipeline_stages

    for name in ("hybrid_layer_pattern", "spec", "yaml_cfg"):
        value = getattr(args, name, None)
        is_local_bert = value == ["local"] and getattr(args, "model_kind", "") == BERT
        if value and not is_local_bert:
            raise UnsupportedError(
                "memory is predicted for GPT, BERT and T5 models that Megatron's flags describe, "
                f"not with --{name.replace('_', '-')}: leave it out."
            )
    args = copy.copy(args)
    vars(args).update({key: value for key, value in _ANYWHERE.items() if hasattr(args, key)})
    with nowhere(grid, stage):
        try:
            config, build_model = build_function(args)
            models = build_virtual_pipeline_stages(
                build_model,
                process_groups(grid, stage),
                args.virtual_pipeline_model_parallel_size,
            )
        except Exception as error:
            said = words_of(error) or "leave out what a usual GPT, BERT or T5 does not have"
            raise UnsupportedError(
                "Megatron does not build this model of its local layers, which memory is "
                f"predicted with: {said}."
            ) from error
        if args.fp16 or args.bf16:
            models = [Float16Module(config, model) for model in models]
        for model in models:
            _make_whole(model, grid)
        parameter_rules.give(parameter_rules.parsed(getattr(args, "came_rule", None)), models)
    return [_chunk(model) for model in models]


def _chunk(model: torch.nn.Module) -> Chunk:
    inner: Any = model.module if isinstance(model, Float16Module) else model
    layers = [module for module in inner.modules() if isinstance(module, TransformerLayer)]
    expert_layers = sum(isinstance(layer.mlp, MoELayer) for layer in layers)
    return Chunk(
        params=tuple(model.parameters()),
        dense_layers=len(layers) - expert_layers,
        expert_layers=expert_layers,
        embeds=inner.pre_process,
        predicts=inner.post_process,
        model=model,
    )


def _make_whole(model: torch.nn.Module, grid: Grid) -> None:
    """Give latent attention the weights that Transformer Engine's layers hold on every rank."""
    for layer in model.modules():
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            projection = getattr(layer, name, None)
            if projection is not None and projection.weight.tensor_model_parallel:
                rows, columns = projection.weight.shape
                whole = torch.empty(rows * grid.tensor, columns, dtype=projection.weight.dtype)
                projection.weight = torch.nn.Parameter(whole)
