"""Bytes of activations, an estimate: Megatron's own formula, for every pipeline stage.

Megatron evaluates it for the first stage (``megatron.training.theoretical_memory_usage``). It is
linear in the number of layers, so its terms, of a layer, of the embeddings and of the loss, can be
read off and put together for any stage. To it come what it leaves out: context parallelism (a
shorter sequence), full recomputation, experts, and fp32. Attention scores are not counted, as with
flash attention or selective recomputation.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_came.memory.grid import Grid
from megatron_came.memory.meta_model import Chunk


@dataclass(frozen=True, slots=True)
class _Terms:
    """Bytes of one micro-batch.

    Attributes:
        dense_layer: of a layer without experts.
        expert_layer: of one with experts.
        layer_input: of what full recomputation keeps of a layer.
        embeddings: of the embeddings.
        loss: of the output layer and the loss.
    """

    dense_layer: float
    expert_layer: float
    layer_input: float
    embeddings: float
    loss: float


def activation_bytes(
    args: argparse.Namespace, grid: Grid, stage: int, chunks: Sequence[Chunk]
) -> int:
    """Estimate the activations that a stage holds at its fullest.

    Args:
        args: Megatron's arguments, validated.
        grid: the sizes of the layout.
        stage: number of the stage.
        chunks: its model chunks.
    """
    terms = _terms(args)
    in_flight = micro_batches_in_flight(args, grid, stage)
    total = 0.0
    live = 0.0
    for chunk in chunks:
        kept, recomputed = _layers(args, terms, chunk)
        total += kept
        live = max(live, recomputed)
    total *= in_flight
    if chunks[0].embeds:
        total += terms.embeddings * in_flight
    if chunks[-1].predicts:
        total += terms.loss
    return math.ceil(total + live)


def micro_batches_in_flight(args: argparse.Namespace, grid: Grid, stage: int) -> float:
    """How many micro-batches have gone forward through a stage and not yet back.

    A fraction with virtual stages, where some are between two chunks of the stage. On the first
    stage it is what Megatron's formula has.
    """
    count: int = max(1, args.global_batch_size // (args.micro_batch_size * grid.data))
    if grid.virtual is None:
        return float(min(grid.pipeline - stage, count))
    chunks = 2 * (grid.pipeline - stage - 1) + (grid.virtual - 1) * grid.pipeline + 1
    return float(min(chunks, count * grid.virtual) / grid.virtual)


def _terms(args: argparse.Namespace) -> _Terms:
    from megatron.training import theoretical_memory_usage as megatron

    formula = megatron.compute_activation_memory_without_sp
    if args.sequence_parallel and args.recompute_granularity == "selective":
        formula = megatron.compute_activation_memory  # Megatron chooses so as well

    def evaluate(layers: int, stages: int, ffn_hidden_size: int = args.ffn_hidden_size) -> float:
        case = copy.copy(args)
        case.seq_length = args.seq_length / args.context_parallel_size
        case.num_layers, case.pipeline_model_parallel_size = layers, stages
        case.virtual_pipeline_model_parallel_size = None
        case.ffn_hidden_size = ffn_hidden_size
        return float(formula(case, None)) * width

    width = 1 if args.fp16 or args.bf16 else 2  # the formula counts 16-bit activations
    embeddings = evaluate(0, 2) / 2
    experts = args.ffn_hidden_size
    if args.num_experts:
        experts = args.moe_router_topk * args.moe_ffn_hidden_size
        experts += args.moe_shared_expert_intermediate_size or 0
    cut = args.sequence_parallel or args.distribute_saved_activations
    tokens = args.seq_length / args.context_parallel_size * args.micro_batch_size
    return _Terms(
        dense_layer=evaluate(1, 2) - evaluate(0, 2),
        expert_layer=evaluate(1, 2, experts) - evaluate(0, 2, experts),
        layer_input=2 * width * tokens * args.hidden_size / (args.tensor_model_parallel_size**cut),
        embeddings=embeddings,
        loss=evaluate(0, 1) - embeddings,
    )


def _layers(args: argparse.Namespace, terms: _Terms, chunk: Chunk) -> tuple[float, float]:
    """Bytes that a chunk keeps of a micro-batch, and what recomputation adds while it lasts."""
    all_layers = chunk.dense_layers * terms.dense_layer + chunk.expert_layers * terms.expert_layer
    if args.recompute_granularity != "full" or not chunk.layers:
        return all_layers, 0.0
    largest = max(
        terms.dense_layer if chunk.dense_layers else 0.0,
        terms.expert_layer if chunk.expert_layers else 0.0,
    )
    together = min(args.recompute_num_layers or 1, chunk.layers)
    if args.recompute_method == "block":  # the first layers, each alone
        kept = (chunk.layers - together) / chunk.layers * all_layers
        return kept + together * terms.layer_input, largest
    return math.ceil(chunk.layers / together) * terms.layer_input, together * largest
