"""Bytes of activations, an estimate: Megatron's own formula, for every pipeline stage.

Megatron evaluates it for the first stage (``megatron.training.theoretical_memory_usage``). It is
linear in the number of layers, so its terms, of a layer, of the embeddings and of the loss, can be
read off and put together for any stage. To it come what it leaves out: context parallelism (a
shorter sequence), full recomputation, experts, and fp32. Attention scores are not counted, as with
flash attention or selective recomputation.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_came.memory.grid import Grid
from megatron_came.memory.meta_model import Chunk


@dataclass(frozen=True, slots=True)
class _Terms:
    """Bytes of one micro-batch: of a layer, its input alone, the embeddings, and the loss."""

    dense_layer: float
    expert_layer: float
    layer_input: float
    embeddings: float
    loss: float


def activation_bytes(
    args: argparse.Namespace, grid: Grid, stage: int, chunks: Sequence[Chunk]
) -> int:
    """Estimate the activations that a stage with these chunks holds at its fullest."""
    terms = _terms(args)
    in_flight = micro_batches_in_flight(args, grid, stage)
    layers = [_layers(args, terms, chunk) for chunk in chunks]
    total = sum(kept for kept, _ in layers) * in_flight
    total += terms.embeddings * chunks[0].embeds * in_flight + terms.loss * chunks[-1].predicts
    return math.ceil(total + max(recomputed for _, recomputed in layers))


def micro_batches_in_flight(args: argparse.Namespace, grid: Grid, stage: int) -> float:
    """How many micro-batches have gone forward through a stage and not yet back.

    A fraction with virtual stages, where some are between two chunks of the stage. On the first
    stage it is what Megatron's formula has.
    """
    count: int = max(1, args.global_batch_size // (args.micro_batch_size * grid.data))
    if grid.virtual is None:
        return float(min(grid.pipeline - stage, count))
    # The warm-up of Megatron's interleaved schedule, and the one under way.
    chunks = 2 * (grid.pipeline - stage - 1) + (grid.virtual - 1) * grid.pipeline + 1
    return float(min(chunks, count * grid.virtual) / grid.virtual)


def _terms(args: argparse.Namespace) -> _Terms:
    from megatron.training import theoretical_memory_usage as megatron

    formula = megatron.compute_activation_memory_without_sp
    if args.sequence_parallel and args.recompute_granularity == "selective":
        formula = megatron.compute_activation_memory  # Megatron chooses so as well
    width = 1 if args.fp16 or args.bf16 else 2  # the formula counts 16-bit activations
    case = copy.copy(args)
    case.seq_length = args.seq_length / args.context_parallel_size
    case.virtual_pipeline_model_parallel_size = None  # see micro_batches_in_flight

    def evaluate(layers: int, stages: int, ffn_hidden_size: int = args.ffn_hidden_size) -> float:
        case.num_layers, case.pipeline_model_parallel_size = layers, stages
        case.ffn_hidden_size = ffn_hidden_size
        return float(formula(case, None)) * width

    experts = args.ffn_hidden_size
    if args.num_experts:
        experts = args.moe_router_topk * args.moe_ffn_hidden_size
        experts += args.moe_shared_expert_intermediate_size or 0
    # With two stages the formula counts two micro-batches in flight, and no loss.
    embeddings = evaluate(0, 2) / 2
    cut = args.sequence_parallel or args.distribute_saved_activations
    ranks = args.tensor_model_parallel_size if cut else 1
    return _Terms(
        dense_layer=evaluate(1, 2) - evaluate(0, 2),
        expert_layer=evaluate(1, 2, experts) - evaluate(0, 2, experts),
        layer_input=2 * width * case.seq_length * args.micro_batch_size * args.hidden_size / ranks,
        embeddings=embeddings,
        loss=evaluate(0, 1) - embeddings,
    )


def _layers(args: argparse.Namespace, terms: _Terms, chunk: Chunk) -> tuple[float, float]:
    """Bytes that a chunk keeps of a micro-batch, and what recomputation adds while it lasts."""
    all_layers = chunk.dense_layers * terms.dense_layer + chunk.expert_layers * terms.expert_layer
    if args.recompute_granularity != "full" or not chunk.layers:
        return all_layers, 0.0
    largest = max(
        terms.dense_layer * (chunk.dense_layers > 0), terms.expert_layer * (chunk.expert_layers > 0)
    )
    together = min(args.recompute_num_layers or 1, chunk.layers)
    if args.recompute_method == "block":  # the first layers, each alone
        kept = (chunk.layers - together) / chunk.layers * all_layers
        return kept + together * terms.layer_input, largest
    return math.ceil(chunk.layers / together) * terms.layer_input, together * largest
