"""What ranks hold with PyTorch's FSDP2 and with Megatron-FSDP: parts of weights and gradients."""

import argparse
import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_came.memory import stages
from megatron_came.memory.grid import Grid
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


def lay_out(args: argparse.Namespace, grid: Grid, number: int, chunks: Sequence[Chunk]) -> Stage:
    """Lay out a stage as Megatron's FSDP wrappers do."""
    plain = copy.copy(args)
    plain.use_torch_fsdp2 = plain.use_megatron_fsdp = False
    stage = stages.lay_out(plain, grid, number, chunks)
    if getattr(args, "use_torch_fsdp2", False):
        ranks = grid.data * grid.context
        buffers = [each for chunk in chunks for each in _by_rows(chunk, ranks)]
        # Two marks of each DTensor in float64 go with the sums: see core/agreement.py.
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
        padded, sizes = 0, torch.zeros(2, ranks, dtype=torch.int64, device="cpu")
        for param in chunk.params:
            if param.dtype != dtype or not param.requires_grad:
                continue
            rows, of_row = len(param), param[0].numel()
            most = -(-rows // ranks)
            padded += most * of_row
            sizes += stages.counts((rows - place * most).clamp(0, most) * of_row)
        # In place of Megatron's own key of a buffer.
        key = SimpleNamespace(param_dtype=dtype, grad_dtype=dtype, is_expert_parallel=False)
        yield stages.buffer_of(key, padded, sizes)


def _by_bucket(args: argparse.Namespace, grid: Grid, chunk: Chunk) -> Iterable[Buffer]:
    """Cut every bucket of parameters into one part for each rank, as Megatron-FSDP does."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        build_data_parallel_buffer_index,
    )

    strategy = args.data_parallel_sharding_strategy
    settings: Any = SimpleNamespace(data_parallel_sharding_strategy=strategy)
    for group in _buckets(args, grid, chunk):
        shards = grid.shards[group.is_expert_param]
        shapes, factor = [param.shape for param in group.params], group.chunk_size_factor
        items, bucket, _ = build_data_parallel_buffer_index(
            shapes, 0, shards, False, settings, chunk_size_factor=factor
        )
        starts = {key: (item.global_data_index, item.size) for key, item in items.items()}
        places = {key: (start, start + size, 0) for key, (start, size) in starts.items()}
        layout = SimpleNamespace(bucket_indices=[(0, bucket.size)], param_index_map=places)
        key = SimpleNamespace(
            param_dtype=group.dtype,
            grad_dtype=args.megatron_fsdp_main_grads_dtype or group.dtype,
            is_expert_parallel=group.is_expert_param,
        )
        # Main weights are in fp32.
        element_sizes = (group.dtype.itemsize, key.grad_dtype.itemsize, 4)
        weights, gradients, main_weights = (
            bucket.size // (shards if is_cut else 1) * size
            for is_cut, size in zip(_CUT[strategy], element_sizes, strict=True)
        )
        buffer = stages.cut(key, layout, shards)
        yield replace(buffer, weights=weights, gradients=gradients, main_weights=main_weights)


def _buckets(args: argparse.Namespace, grid: Grid, chunk: Chunk) -> list[Any]:
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        BucketingPolicy,
        _get_parameter_groups,
    )

    _, size = stages.bucketing(args, grid, chunk.params)
    # As Megatron-FSDP's wrapper sets it up: units are gathered whole where weights are cut.
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
    kinds = (TransformerLayer, LanguageModelEmbedding)
    modules = (module for module in chunk.model.modules() if isinstance(module, kinds))
    found: list[list[Any]] = [list(module.parameters()) for module in modules]
    inside = {param for unit in found for param in unit}
    return [unit for unit in (*found, [p for p in chunk.params if p not in inside]) if unit]
