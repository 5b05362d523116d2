"""What cannot work on a CPU, by flag; Megatron's own defaults, which need a GPU, included."""

from __future__ import annotations

from typing import Any

from megatron_came.rules import Rule

_ENGINE = "Transformer Engine, whose kernels run on a GPU"
_NCCL = "NCCL, which moves data between GPUs"
_ATTENTION = "an attention kernel for GPUs"
_ROUTING = "communication kernels for GPUs"

# Flags of which no value can work, by what they need; after "=" the name of the argument.
_LEFT_OUT = {
    _ENGINE: "--fp8-format=fp8 --fp4-format=fp4 --tp-comm-overlap --use-te-activation-func "
    "--use-transformer-engine-op-fuser --te-rng-tracker --fused-residual-rmsnorm "
    "--moe-permute-fusion --moe-router-fusion --experimental-attention-variant "
    "--multi-latent-attention --moe-latent-size --fp32-residual-connection",
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


def _needs(what: str, instead: str, flag: str = "", given: str = "{given}", **more: Any) -> Rule:
    sentence = f"{given} needs {what}, and this run is on the CPU: {instead}."
    return Rule(sentence, flag, **more)


RULES = (
    _needs(_ENGINE, "use --transformer-impl local", flag="--transformer-impl", works=("local",)),
    _needs(_NCCL, "use --distributed-backend gloo", flag="--distributed-backend", works=("gloo",)),
    _needs(
        _ATTENTION,
        "use --attention-backend unfused",
        flag="--attention-backend",
        works=("unfused", "local", "auto"),
    ),
    _needs("CUDA graphs", "leave it out", flag="--cuda-graph-impl", works=("none",)),
    _needs(
        _ROUTING,
        "use --moe-token-dispatcher-type alltoall",
        flag="--moe-token-dispatcher-type",
        works=("allgather", "alltoall"),
    ),
    _needs(
        "the CUDA profiler",
        "add --use-pytorch-profiler",
        flag="--profile",
        when=lambda settings: not settings.use_pytorch_profiler,
    ),
    _needs(
        "GPU memory to offload from",
        "leave it out",
        flag="--optimizer-cpu-offload",
        when=lambda settings: settings.optimizer in (None, *_MEGATRONS),
    ),
    _needs(  # the process that writes checkpoints cannot be made to fork
        "a process that uses CUDA afresh",
        "leave it out",
        flag="--use-persistent-ckpt-worker",
        releases=("0.16",),
    ),
    *(
        _needs(what, "leave it out", flag=flag, argument=argument)
        for what, flags in _LEFT_OUT.items()
        for flag, _, argument in (each.partition("=") for each in flags.split())
    ),
    *(
        _needs(
            _ENGINE,
            "leave it out",
            given=f"--recompute-modules {module}",
            when=lambda settings, module=module: module in (settings.recompute_modules or ()),
        )
        for module in _RECOMPUTED_BY_ENGINE
    ),
)
