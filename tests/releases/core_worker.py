"""Trains a small GPT with ``megatron.core`` alone, as users without Megatron's training loop do.

It is the worker of ``tests.training.harness.run``.
"""

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_came.launch import prepare

prepare()  # before anything imports Megatron

from megatron.core import (  # noqa: E402
    dist_checkpointing,
    num_microbatches_calculator,
    parallel_state,
)
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe import grouped_gemm_util  # noqa: E402

from megatron_came.megatron.config import CameOptimizerConfig  # noqa: E402
from tests.training import variants  # noqa: E402
from tests.training.groups import serve  # noqa: E402
from tests.training.recording import digest, optimizer_digest  # noqa: E402

VOCABULARY = 64


def parse(flags: list[str]) -> argparse.Namespace:
    """Those of Megatron's flags that matter here, under their names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("num-layers", "hidden-size", "num-attention-heads", "seq-length", "seed"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("tensor-model-parallel-size", "pipeline-model-parallel-size"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int)
    parser.add_argument("--train-iters", type=int)
    parser.add_argument("--num-experts", type=int)
    for name in ("lr", "weight-decay", "clip-grad"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("use-distributed-optimizer", "moe-grouped-gemm", "weights-only"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("save", "load", "sharding"):
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(flags)[0]


def build(args: argparse.Namespace) -> DistributedDataParallel:
    """This rank's part of the model, ready to train."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        num_moe_experts=args.num_experts,
        moe_ffn_hidden_size=32 if args.num_experts else None,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=args.moe_grouped_gemm,
        moe_use_legacy_grouped_gemm=args.moe_grouped_gemm,
        add_bias_linear=not args.num_experts,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,  # as the training loop has it
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(
            args.num_experts, args.moe_grouped_gemm, moe_use_legacy_grouped_gemm=True
        ),
        VOCABULARY,
        args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    )
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=args.use_distributed_optimizer)
    return DistributedDataParallel(config, ddp, model)


def samples(args: argparse.Namespace, iteration: int):
    """This rank's tokens of an iteration, sample by sample: sequences that can be learned."""
    rank, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    for index in range(rank, args.global_batch_size, size):
        numbers = torch.Generator().manual_seed(1000 * iteration + index)
        start, step = torch.randint(1, VOCABULARY, (2,), generator=numbers).tolist()
        tokens = (start + (step % 4 + 1) * torch.arange(args.seq_length + 1)) % VOCABULARY
        yield tokens[:-1].unsqueeze(0), tokens[1:].unsqueeze(0)


def forward(data, model):
    """Run the model on the next sample."""
    tokens, labels = next(data)
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1).expand(1, 1, length, length)
    output = model(tokens, torch.arange(length).unsqueeze(0), mask, labels=labels)
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


def train_step(args, iteration, model, optimizer) -> float | None:
    """Take a step; return the loss on the last pipeline stage."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    replicas = parallel_state.get_data_parallel_world_size()
    seen = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=samples(args, iteration),
        model=[model],
        num_microbatches=args.global_batch_size // replicas,
        seq_length=args.seq_length,
        micro_batch_size=1,
        decoder_seq_length=args.seq_length,
        forward_only=False,
    )
    success, _, _ = optimizer.step()
    if not success:
        raise RuntimeError("the optimizer skipped a step")
    if not seen:
        return None
    loss = torch.stack([each["loss"] for each in seen]).mean()
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return float(loss) / replicas


def checkpoint(args, model, optimizer, *, is_loading: bool) -> dict:
    """What is saved or loaded."""
    state = {"model": model.module.sharded_state_dict()}
    if not args.weights_only:
        metadata = {"distrib_optim_sharding_type": args.sharding} if args.sharding else {}
        weights = model.module.sharded_state_dict(metadata=metadata or None)
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata
        )
    return state


def run_case(case: dict) -> dict:
    """Train as one case says, and return what was seen on this rank."""
    args = parse(case["flags"])
    num_microbatches_calculator.unset_num_microbatches_calculator()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
    )
    model_parallel_cuda_manual_seed(args.seed)
    seen = {"losses": [], "error": None, "weights": {}, "state": None}
    with contextlib.ExitStack() as stack:
        variants.apply(case["variant"], stack)
        stack.enter_context(
            mock.patch.object(grouped_gemm_util, "assert_grouped_gemm_is_available")
        )
        try:
            model = build(args)
            config = CameOptimizerConfig(
                lr=args.lr,
                weight_decay=args.weight_decay,
                clip_grad=args.clip_grad,
                use_distributed_optimizer=args.use_distributed_optimizer,
            )
            optimizer = get_megatron_optimizer(config, [model])
        except ValueError as error:
            seen["error"] = f"{type(error).__name__}: {error}"
            return seen
        first = 0
        if args.load:
            state = checkpoint(args, model, optimizer, is_loading=True)
            state = dist_checkpointing.load(state, args.load)
            model.module.load_state_dict(state["model"])
            optimizer.reload_model_params()
            if "optimizer" in state:
                optimizer.load_state_dict(state["optimizer"])
                first = 10
        for iteration in range(first, args.train_iters):
            loss = train_step(args, iteration, model, optimizer)
            if loss is not None:
                seen["losses"].append(loss)
        if args.save:
            Path(args.save).mkdir(exist_ok=True)
            state = checkpoint(args, model, optimizer, is_loading=False)
            dist_checkpointing.save(state, args.save)
    seen["weights"] = {name: digest([param]) for name, param in model.named_parameters()}
    seen["state"] = optimizer_digest(optimizer)
    return seen


def main() -> None:
    serve(run_case)
