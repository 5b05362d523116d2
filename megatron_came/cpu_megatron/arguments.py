"""Megatron's flags on a CPU: defaults that work, and one sentence for each value that cannot.

The defaults are set in Megatron's own argument parser, so a flag that is given wins over them.
What cannot work is refused by value, before Megatron looks at the arguments: no default is refused,
so a refused value was asked for, on the command line or by the arguments of a checkpoint.
"""

import os
from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_came.patching import Function
from megatron_came.rules import Rule, stop_if_refused
from megatron_came.versions import MegatronError, release

# What is announced, and what it sets: a destination of Megatron's parser and its value.
_DEFAULTS: dict[str, tuple[str, object]] = {
    "--transformer-impl local": ("transformer_impl", "local"),
    "--distributed-backend gloo": ("distributed_backend", "gloo"),
    "--attention-backend unfused": ("attention_backend", "unfused"),
    "--async-strategy mcore": ("async_strategy", "mcore"),
    "--num-workers 0": ("num_workers", 0),
    "--no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False),
    "--no-persist-layer-norm": ("no_persist_layer_norm", True),
    "--no-masked-softmax-fusion": ("masked_softmax_fusion", False),
    "--no-bias-gelu-fusion": ("bias_gelu_fusion", False),
    "--no-bias-swiglu-fusion": ("bias_swiglu_fusion", False),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", False),
    "--no-rope-fusion": ("apply_rope_fusion", False),
    "--no-gradient-reduce-div-fusion": ("gradient_reduce_div_fusion", False),  # of Megatron-FSDP
}

# What cannot work, by flag; Megatron's own defaults, which need a GPU, included.
_ENGINE = "Transformer Engine, whose kernels run on a GPU"
_NCCL = "NCCL, which moves data between GPUs"
_ATTENTION = "an attention kernel for GPUs"
_ROUTING = "communication kernels for GPUs"
_OUT = "leave it out"

# Flags of which no value can work, by what they need; after "=" the name of the argument.
_LEFT_OUT = {
    _ENGINE: "--fp8-format=fp8 --fp4-format=fp4 --tp-comm-overlap --use-te-activation-func "
    "--use-transformer-engine-op-fuser --te-rng-tracker --fused-residual-rmsnorm "
    "--moe-permute-fusion --moe-router-fusion --experimental-attention-variant "
    "--multi-latent-attention --moe-latent-size --fp32-residual-connection --save-dgrads-interval "
    "--save-activations-interval",
    _NCCL: "--use-nccl-ub=nccl_ub --nccl-communicator-config-path "
    "--pipeline-model-parallel-comm-backend --use-sharp",
    _ATTENTION: "--use-flash-attn",
    _ROUTING: "--moe-enable-deepep",
    "CUDA graphs": "--enable-cuda-graph --external-cuda-graph --optimizer-cuda-graph",
    "GPU memory to offload from": "--cpu-offloading-num-layers "
    "--fine-grained-activation-offloading --moe-paged-stash",
    "a grouped matrix product for GPUs": "--moe-grouped-gemm",
    "kernels for GPUs": "--batch-invariant-mode",
    "Megatron's inference engine, which runs on a GPU": "--perform-rl-step",
    "GPU memory to record": "--record-memory-history",
    "a GPU to test": "--gpu-sniff-test-interval",
    "a GPU's energy counter": "--log-energy",
    "arguments that default to a GPU's, where flags have a CPU's": "--yaml-cfg",
}
# Optimizers of Megatron's own, whose offload pins memory.
_MEGATRONS = ("adam", "sgd", "lion", "muon", "dist_muon", "adaptive_muon", "soap")
# What Megatron recomputes in a way of its own, which asks Transformer Engine about its numbers.
_RECOMPUTED_BY_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")


def _needs(flag: str, what: str, instead: str, given: str = "{given}", **more: Any) -> Rule:
    sentence = f"{given} needs {what}, and this run is on the CPU: {instead}."
    return Rule(sentence, flag, **more)


RULES = (
    _needs("--transformer-impl", _ENGINE, "use --transformer-impl local", works=("local",)),
    _needs("--distributed-backend", _NCCL, "use --distributed-backend gloo", works=("gloo",)),
    _needs(
        "--attention-backend",
        _ATTENTION,
        "use --attention-backend unfused",
        works=("unfused", "local", "auto"),
    ),
    _needs("--cuda-graph-impl", "CUDA graphs", _OUT, works=("none",)),
    _needs(
        "--moe-token-dispatcher-type",
        _ROUTING,
        "use --moe-token-dispatcher-type alltoall",
        works=("allgather", "alltoall"),
    ),
    _needs(
        "--ckpt-fully-parallel-load-exchange-algo",
        "NCCL, which gathers tensors of several sizes",
        "use broadcast",
        works=("broadcast", "gather_object"),
        when=lambda s: s.ckpt_fully_parallel_load,
    ),
    _needs(
        "--profile",
        "the CUDA profiler",
        "add --use-pytorch-profiler",
        when=lambda s: not s.use_pytorch_profiler,
    ),
    _needs(
        "--optimizer-cpu-offload",
        "GPU memory to offload from",
        _OUT,
        when=lambda s: s.optimizer in (None, *_MEGATRONS),
    ),
    # The process that writes checkpoints cannot be made to fork.
    _needs(
        "--use-persistent-ckpt-worker", "a process that uses CUDA afresh", _OUT, releases=("0.16",)
    ),
    *(
        _needs(flag, what, _OUT, argument=argument)
        for what, flags in _LEFT_OUT.items()
        for flag, _, argument in (each.partition("=") for each in flags.split())
    ),
    Rule(
        "{given} at --context-parallel-size {at.context_parallel_size} needs an attention kernel "
        "for GPUs, and this run is on the CPU: leave it out, or use size 1.",
        "--window-size",
        when=lambda s: (s.context_parallel_size or 1) > 1,
    ),
    Rule(
        "--recompute-modules mlp with biases does not end: add --disable-bias-linear.",
        when=lambda s: (
            not s.skip_train
            and s.recompute_granularity == "selective"
            and "mlp" in (s.recompute_modules or ())
            and s.add_bias_linear
        ),
    ),
    Rule(
        "--num-experts {at.num_experts} with biases ends in an error of PyTorch's where Megatron's "
        "own experts lie whole on one rank, and this run is on the CPU: add --disable-bias-linear.",
        when=lambda s: (
            not s.skip_train
            and s.num_experts
            and s.add_bias_linear
            and s.expert_model_parallel_size == 1
            and (s.expert_tensor_parallel_size or s.tensor_model_parallel_size) == 1
        ),
    ),
    *(
        _needs(
            "",
            _ENGINE,
            _OUT,
            given=f"--recompute-modules {module}",
            when=lambda s, module=module: module in (s.recompute_modules or ()),
        )
        for module in _RECOMPUTED_BY_ENGINE
    ),
)


def with_defaults(
    original: Function, parser: ArgumentParser, *args: Any, **kwargs: Any
) -> ArgumentParser:
    """Let a function that adds Megatron's flags to a parser set the defaults of a CPU."""
    parser = original(parser, *args, **kwargs)
    known = {action.dest for action in parser._actions}
    for flag, (destination, value) in _DEFAULTS.items():
        if destination in known:
            parser.set_defaults(**{destination: value})
        elif destination != "async_strategy" or release() >= (0, 17):  # 0.16 has only the one
            raise MegatronError(
                f"Training on the CPU sets {flag}, which this version of Megatron-LM does not "
                f"have: use core_v0.19.0."
            )
    return parser


def with_check(original: Function, *args: Any, **kwargs: Any) -> Namespace:
    """Let Megatron's parsing refuse what cannot work: the flags of a file are not validated."""
    arguments: Namespace = original(*args, **kwargs)
    stop_if_refused(RULES, arguments)
    return arguments


def with_check_and_attention(
    original: Function, arguments: Namespace, *args: Any, **kwargs: Any
) -> Any:
    """Let Megatron's validation refuse what cannot work: a checkpoint's flags come in between."""
    from megatron.core.transformer.enums import AttnBackend

    stop_if_refused(RULES, arguments)
    if arguments.attention_backend == AttnBackend.local and not arguments.spec:
        # Local layers have one attention, whatever its name; Megatron 0.19 wants a --spec for
        # this name that it cannot build.
        arguments.attention_backend = AttnBackend.unfused
    # For FSDP Megatron insists on another number of a GPU's queues than for others. A CPU has none,
    # and the process may train with tensor parallelism next.
    queues = "CUDA_DEVICE_MAX_CONNECTIONS"
    given = os.environ[queues]
    if (arguments.use_torch_fsdp2 or arguments.use_megatron_fsdp) and given == "1":
        os.environ[queues] = "8"
    try:
        return original(arguments, *args, **kwargs)
    finally:
        os.environ[queues] = given
