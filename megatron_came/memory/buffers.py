"""How a training run lays a pipeline stage out in memory: Megatron's buffers, and their slices."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.shard import Shard
from megatron_came.core.state import MATRIX_FACTORS, VECTOR_FACTORS, new_state
from megatron_came.core.sums import SumBuffer
from megatron_came.megatron.sharding import ModelGroups, shard_of
from megatron_came.memory.grid import Grid
from megatron_came.memory.meta_model import Chunk
from megatron_came.memory.precisions import MOMENTUM
from megatron_came.memory.stand_ins import META, SizedGroup

_BLOCK = MOMENTUM["int8"].block


@dataclass(frozen=True, slots=True)
class Slices:
    """What each shard of one of Megatron's buffers holds of the parameters in it.

    Attributes:
        elements: number of elements, padding not included, by shard.
        blocks: number of the blocks that share a scale, by shard.
        param_bytes: bytes of an element of the weights.
        grad_bytes: bytes of an element of the gradients.
        of_experts: cut over the experts' data-parallel ranks.
    """

    elements: Tensor
    blocks: Tensor
    param_bytes: int
    grad_bytes: int
    of_experts: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A pipeline stage as every rank of it holds it, and the slices in which the ranks differ.

    Attributes:
        stage: its number.
        parameters: number of elements of one rank's weights.
        weights: bytes of the weights, padding included.
        gradients: bytes of the gradient buffers, likewise.
        slices: one for each buffer.
        factors: bytes of r and c of all matrices, and of v of all vectors.
        confidence: bytes of R and C of all matrices.
        sums: bytes of CAME's sums over ranks.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    slices: tuple[Slices, ...]
    factors: int
    confidence: int
    sums: int


def lay_out(args: argparse.Namespace, grid: Grid, stage: int, chunks: Sequence[Chunk]) -> Layout:
    """Lay out a stage as Megatron's ``DistributedDataParallel`` and its optimizers do.

    Args:
        args: Megatron's arguments, validated.
        grid: the sizes of the layout.
        stage: number of the stage.
        chunks: its model chunks.
    """
    from megatron.training.training import get_megatron_ddp_config, resolve_ddp_bucket_size

    params = [param for chunk in chunks for param in chunk.params]
    ddp_config = get_megatron_ddp_config(args)
    bucket_size = resolve_ddp_bucket_size(
        ddp_config,
        SizedGroup(grid.data * grid.context),
        ddp_config.overlap_grad_reduce,
        sum(param.numel() for param in params),
    )
    weights = sum(_bytes(param) for param in params if not param.requires_grad)
    gradients = 0
    slices = []
    for number, chunk in enumerate(chunks):
        # Megatron makes one bucket of all but the first chunk of the first stage.
        whole = number > 0 or stage > 0 or args.overlap_param_gather_with_optimizer_step
        for buffer, padded in _buffers(ddp_config, grid, chunk, None if whole else bucket_size):
            slices.append(buffer)
            weights += padded * buffer.param_bytes
            gradients += padded * buffer.grad_bytes
    extras = _extras((param for param in params if param.requires_grad), grid)
    return Layout(
        stage=stage,
        parameters=sum(param.numel() for param in params),
        weights=weights,
        gradients=gradients,
        slices=tuple(slices),
        factors=sum(each.factors for each in extras),
        confidence=sum(each.confidence for each in extras),
        sums=sum(each.sums for each in extras),
    )


def _buffers(
    ddp_config: Any, grid: Grid, chunk: Chunk, bucket_size: int | None
) -> list[tuple[Slices, int]]:
    """A chunk's buffers: their slices, and their number of elements with padding."""
    from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    trained = [param for param in chunk.params if param.requires_grad]
    if not grid.sharded:
        groups = group_params_for_buffers(trained, ddp_config.grad_reduce_in_fp32)
        return [
            (_whole(key, [p.numel() for p in params]), sum(p.numel() for p in params))
            for key, (params, _) in groups.items()
        ]
    layout = DistributedOptimizer.compute_full_param_layout(
        trained,
        bucket_size,
        grid.dense_shards,
        ddp_config,
        expert_data_parallel_world_size=grid.expert_shards,
    )
    return [
        (
            _cut(key, buffer, grid.expert_shards if key.is_expert_parallel else grid.dense_shards),
            buffer.bucket_indices[-1][1],
        )
        for key, buffer in layout.layouts.items()
    ]


def _whole(key: Any, sizes: list[int]) -> Slices:
    return _slices(
        key, torch.tensor([sum(sizes)]), torch.tensor([sum(-(-size // _BLOCK) for size in sizes)])
    )


def _cut(key: Any, buffer: Any, shards: int) -> Slices:
    """Cut every bucket into equal parts, as ``DistributedOptimizer._build_model_gbuf_range``."""
    elements = torch.zeros(shards, dtype=torch.int64, device="cpu")
    blocks = torch.zeros_like(elements)
    for start, stop, bucket in buffer.param_index_map.values():
        bucket_start, bucket_stop = buffer.bucket_indices[bucket]
        part = (bucket_stop - bucket_start) // shards
        first, last = (start - bucket_start) // part, (stop - 1 - bucket_start) // part
        bounds = bucket_start + part * torch.arange(first, last + 2, device="cpu")
        sizes = bounds.clamp(start, stop).diff()
        elements[first : last + 1] += sizes
        blocks[first : last + 1] += -(-sizes // _BLOCK)
    return _slices(key, elements, blocks)


def _slices(key: Any, elements: Tensor, blocks: Tensor) -> Slices:
    return Slices(
        elements, blocks, key.param_dtype.itemsize, key.grad_dtype.itemsize, key.is_expert_parallel
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _groups(grid: Grid) -> ModelGroups:
    tensor: Any = SizedGroup(grid.tensor)
    experts: Any = SizedGroup(grid.expert_tensor)
    embedding: Any = SizedGroup(min(grid.pipeline, 2))  # the first and the last stage
    return ModelGroups(tp=tensor, expert_tp=experts, embedding=embedding)


@dataclass(frozen=True, slots=True)
class _Extras:
    """Bytes that CAME keeps of a parameter beside its momentum, on every rank."""

    factors: int
    confidence: int
    sums: int


def _extras(params: Iterable[Tensor], grid: Grid) -> list[_Extras]:
    """Count each parameter's factors and sums, of parameters that are alike once."""
    groups = _groups(grid)
    known: dict[tuple[object, ...], _Extras] = {}
    found = []
    for param in params:
        shard = shard_of(param, groups)
        alike = (shard.shape, param.dtype, shard.tp_dim, shard.tp_size, shard.copies_group)
        if alike not in known:
            known[alike] = _extras_of(param, shard)
        found.append(known[alike])
    return found


def _extras_of(param: Tensor, shard: Shard) -> _Extras:
    state = new_state(param, shard)
    shared = (*VECTOR_FACTORS, *MATRIX_FACTORS[:2])
    slice_ = ParameterSlice(param, shard)
    sums = SumBuffer([*slice_.square_requests(), *slice_.instability_requests()], META)
    return _Extras(
        factors=sum(_bytes(state[key]) for key in shared if key in state),
        confidence=sum(_bytes(state[key]) for key in MATRIX_FACTORS[2:] if key in state),
        sums=_bytes(sums.flat),
    )


def fullest_shards(layout: Layout, grid: Grid) -> tuple[int, int]:
    """The shards, of dense and of experts' parameters, of the rank that holds most elements."""
    dense, experts = grid.shards()
    held = torch.zeros(len(dense), dtype=torch.int64, device="cpu")
    for part in layout.slices:
        held += part.elements[experts if part.of_experts else dense]
    rank = int(held.argmax())
    return int(dense[rank]), int(experts[rank])


def full_parameters(chunk: Chunk, grid: Grid) -> int:
    """Number of elements that a chunk's weights have on all tensor- and expert-parallel ranks.

    Megatron's second copy of tied embeddings is none of them.
    """
    groups = _groups(grid)
    return sum(
        param.numel()
        * shard_of(param, groups).tp_size
        * (1 if getattr(param, "allreduce", True) else grid.expert)
        for param in chunk.params
        if not getattr(param, "shared", False)
    )
