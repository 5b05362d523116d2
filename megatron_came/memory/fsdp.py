"""What ranks hold with PyTorch's FSDP2 and with Megatron-FSDP: parts of weights and gradients."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from megatron_came.memory import stages
from megatron_came.memory.grid import Grid
from megatron_came.memory.launch_command import LaunchError
from megatron_came.memory.meta_model import Chunk
from megatron_came.memory.stages import Buffer, Stage

_SCATTERED = "optim_grads_params"
# Of weights, gradients and main weights: whether a rank keeps its part alone.
_CUT = {
    "no_shard": (False, False, False),
    "optim": (False, False, True),
    "optim_grads": (False, True, True),
    _SCATTERED: (True, True, True),
}
# What changes where something lies, and what there is instead.
_NOT_PREDICTED = (
    ("use_precision_aware_optimizer", "--use-precision-aware-optimizer", "leave it out"),
    ("fsdp_double_buffer", "--fsdp-double-buffer", "leave it out"),
    ("nccl_ub", "--use-nccl-ub", "leave it out"),
)


def name_of(args: argparse.Namespace) -> str:
    """The kind of FSDP that a launch has, in words; nothing if it has none."""
    if getattr(args, "use_torch_fsdp2", False):
        return "FSDP2"
    is_megatrons = getattr(args, "use_megatron_fsdp", False)
    return f"Megatron-FSDP, {args.data_parallel_sharding_strategy}" if is_megatrons else ""


def refuse(args: argparse.Namespace) -> None:
    """Refuse what is laid out otherwise.

    Args:
        args: Megatron's, validated.

    Raises:
        LaunchError: there is some of it.
    """
    flag = "--use-torch-fsdp2" if getattr(args, "use_torch_fsdp2", False) else "--use-megatron-fsdp"
    for name, other, instead in _NOT_PREDICTED:
        if getattr(args, name, None):
            raise LaunchError(f"memory cannot be predicted with {flag} and {other}: {instead}.")
    if args.num_distributed_optimizer_instances > 1:
        raise LaunchError(
            f"memory cannot be predicted with {flag} and --num-distributed-optimizer-instances "
            f"{args.num_distributed_optimizer_instances}: use 1."
        )
    has_main = getattr(args, "megatron_fsdp_main_params_dtype", None) == torch.float32
    if getattr(args, "use_megatron_fsdp", False) and not has_main:
        raise LaunchError(
            "memory cannot be predicted with another --megatron-fsdp-main-params-dtype than fp32: "
            "use that."
        )


def lay_out(args: argparse.Namespace, grid: Grid, number: int, chunks: Sequence[Chunk]) -> Stage:
    """Lay out a stage as Megatron's FSDP wrappers do."""
    plain = copy.copy(args)
    plain.use_torch_fsdp2 = plain.use_megatron_fsdp = False
    stage = stages.lay_out(plain, grid, number, chunks)
    if getattr(args, "use_torch_fsdp2", False):
        ranks = grid.data * grid.context
        buffers = [each for chunk in chunks for each in _by_rows(chunk, ranks)]
        # Marks of DTensors, with which ranks agree on what they update; see core/agreement.py.
        marked = sum(p.requires_grad for chunk in chunks for p in chunk.params) * (ranks > 1)
        return replace(
            stage, buffers=tuple(buffers), whole_buffers=(), sums=stage.sums + 16 * marked
        )
    buffers = [each for chunk in chunks for each in _by_bucket(args, grid, chunk)]
    return replace(stage, buffers=tuple(buffers), whole_buffers=())


def _by_rows(chunk: Chunk, ranks: int) -> Iterable[Buffer]:
    """Cut every parameter by rows, as ``fully_shard`` does, which pads what a rank lacks."""
    place = torch.arange(ranks, device="cpu")
    for dtype in dict.fromkeys(param.dtype for param in chunk.params):
        padded, elements, blocks = 0, torch.zeros_like(place), torch.zeros_like(place)
        for param in chunk.params:
            if param.dtype != dtype or not param.requires_grad:
                continue
            rows, of_row = len(param), param[0].numel()
            most = -(-rows // ranks)
            held = (rows - place * most).clamp(0, most) * of_row
            padded += most * of_row
            elements, blocks = elements + held, blocks + stages.blocks_of(held)
        yield Buffer(padded, elements, blocks, dtype.itemsize, dtype.itemsize, of_experts=False)


def _by_bucket(args: argparse.Namespace, grid: Grid, chunk: Chunk) -> Iterable[Buffer]:
    """Cut every bucket of parameters into one part for each rank, as Megatron-FSDP does."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        build_data_parallel_buffer_index,
    )

    strategy = args.data_parallel_sharding_strategy
    of_weights, of_gradients, of_main = _CUT[strategy]
    settings: Any = SimpleNamespace(data_parallel_sharding_strategy=strategy)
    for group in _buckets(args, grid, chunk):
        shards = grid.shards[group.is_expert_param]
        items, bucket, _ = build_data_parallel_buffer_index(
            [param.shape for param in group.params],
            0,
            shards,
            False,
            settings,
            chunk_size_factor=group.chunk_size_factor,
        )
        layout = SimpleNamespace(
            bucket_indices=[(0, bucket.size)],
            param_index_map={
                key: (item.global_data_index, item.global_data_index + item.size, 0)
                for key, item in items.items()
            },
        )
        key = SimpleNamespace(
            param_dtype=group.dtype,
            grad_dtype=args.megatron_fsdp_main_grads_dtype or group.dtype,
            is_expert_parallel=group.is_expert_param,
        )
        kept = [
            bucket.size // (shards if is_cut else 1)
            for is_cut in (of_weights, of_gradients, of_main)
        ]
        yield replace(
            stages.cut(key, layout, shards),
            padded=kept[0],
            padded_gradients=kept[1],
            main_weights=kept[2],
        )


def _buckets(args: argparse.Namespace, grid: Grid, chunk: Chunk) -> list[Any]:
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        BucketingPolicy,
        _get_parameter_groups,
    )
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.training.training import get_megatron_ddp_config, resolve_ddp_bucket_size

    from megatron_came.memory.stand_ins import SizedGroup

    ddp_config = get_megatron_ddp_config(args)
    size = resolve_ddp_bucket_size(
        ddp_config,
        SizedGroup(grid.data * grid.context),
        ddp_config.overlap_grad_reduce,
        sum(param.numel() for param in chunk.params),
    )
    strategy = args.data_parallel_sharding_strategy
    policy = BucketingPolicy(
        suggested_bucket_size=None if args.overlap_param_gather_with_optimizer_step else size,
        fsdp_unit_modules=[TransformerLayer] if strategy == _SCATTERED else [],
        data_parallel_sharding_strategy=strategy,
    )
    groups: list[Any] = _get_parameter_groups(chunk.model, policy, {})[0]
    return groups


def made_whole(args: argparse.Namespace, chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Return bytes of weights and gradients of the largest layer that is whole while it computes.

    These are not kept; the embeddings count as a layer, and what is in none as another.
    """
    is_torchs = getattr(args, "use_torch_fsdp2", False)
    is_cut = (True, True) if is_torchs else _CUT[args.data_parallel_sharding_strategy][:2]
    dtype = None if is_torchs else args.megatron_fsdp_main_grads_dtype
    units = [unit for chunk in chunks for unit in _units(chunk)]
    weights = max(sum(param.nbytes for param in unit) for unit in units)
    gradients = max(sum(p.numel() * (dtype or p.dtype).itemsize for p in unit) for unit in units)
    return weights * is_cut[0], gradients * is_cut[1]


def _units(chunk: Chunk) -> list[list[Any]]:
    """Parameters of layers, of the embeddings, and all others."""
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.transformer.transformer_layer import TransformerLayer

    kinds = (TransformerLayer, LanguageModelEmbedding)
    modules = (module for module in chunk.model.modules() if isinstance(module, kinds))
    found: list[list[Any]] = [list(module.parameters()) for module in modules]
    inside = {param for unit in found for param in unit}
    return [unit for unit in (*found, [p for p in chunk.params if p not in inside]) if unit]
