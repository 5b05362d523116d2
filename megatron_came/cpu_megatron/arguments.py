"""Megatron's flags on a CPU: defaults that work, and one sentence for each value that cannot.

The defaults are set in Megatron's own argument parser, so a flag that is given wins over them.
What cannot work is refused by value, before Megatron looks at the arguments: no default is refused,
so a refused value was asked for, on the command line or by the arguments of a checkpoint.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_came.megatron.compat import cpu as releases
from megatron_came.megatron.errors import HostError
from megatron_came.megatron.patching import Function, wrap

# What is announced, and what it sets: a destination of Megatron's parser and its value.
_DEFAULTS: Mapping[str, tuple[str, object]] = {
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
}


@dataclass(frozen=True)
class Refusal:
    """A flag of which some values cannot work on a CPU.

    Attributes:
        flag: The flag.
        destination: Its name among the parsed arguments.
        needs: What those values need and a CPU lacks.
        instead: What to do instead.
        works: The values that do work, besides "not given" (None, False, 0 or an empty list).
    """

    flag: str
    destination: str
    needs: str
    instead: str
    works: tuple[object, ...] = ()

    def message(self, arguments: argparse.Namespace) -> str | None:
        """The sentence that refuses ``arguments``, or None if there is nothing to refuse."""
        value = getattr(arguments, self.destination, None)
        if not value or getattr(value, "name", value) in self.works:
            return None
        return self.sentence(self.flag if value is True else f"{self.flag} {_as_typed(value)}")

    def sentence(self, given: str) -> str:
        """The sentence that refuses what was given."""
        return f"{given} needs {self.needs}, and this run is on the CPU: {self.instead}."


def _as_typed(value: object) -> str:
    """How ``value`` was typed on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(_as_typed(item) for item in value)
    return str(getattr(value, "name", value))


def _leave_out(flag: str, needs: str, destination: str | None = None) -> Refusal:
    return Refusal(
        flag=flag,
        destination=destination or flag.removeprefix("--").replace("-", "_"),
        needs=needs,
        instead="leave it out",
    )


# What Megatron recomputes in a way of its own, which asks Transformer Engine about its numbers.
_RECOMPUTED_BY_ENGINE = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")
_GRAPHS = "CUDA graphs"
_ENGINE = "Transformer Engine, whose kernels run on a GPU"
_NCCL = "NCCL, which moves data between GPUs"
_OFFLOAD = "GPU memory to offload from"
_FSDP = "the GPU memory management of FSDP"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--transformer-impl",
        "transformer_impl",
        _ENGINE,
        "use --transformer-impl local",
        ("local",),
    ),
    Refusal(
        "--distributed-backend",
        "distributed_backend",
        _NCCL,
        "use --distributed-backend gloo",
        ("gloo",),
    ),
    Refusal(
        "--attention-backend",
        "attention_backend",
        "an attention kernel for GPUs",
        "use --attention-backend unfused",
        ("unfused", "local", "auto"),
    ),
    _leave_out("--use-flash-attn", "an attention kernel for GPUs"),
    _leave_out("--fp8-format", _ENGINE, "fp8"),
    _leave_out("--fp4-format", _ENGINE, "fp4"),
    _leave_out("--tp-comm-overlap", _ENGINE),
    _leave_out("--use-transformer-engine-op-fuser", _ENGINE),
    _leave_out("--use-te-activation-func", _ENGINE),
    _leave_out("--te-rng-tracker", _ENGINE),
    _leave_out("--fused-residual-rmsnorm", _ENGINE),
    _leave_out("--moe-permute-fusion", _ENGINE),
    _leave_out("--moe-router-fusion", _ENGINE),
    _leave_out("--experimental-attention-variant", _ENGINE),
    _leave_out("--multi-latent-attention", _ENGINE),
    _leave_out("--moe-latent-size", _ENGINE),
    _leave_out("--fp32-residual-connection", _ENGINE),
    _leave_out("--enable-cuda-graph", _GRAPHS),
    _leave_out("--external-cuda-graph", _GRAPHS),
    _leave_out("--optimizer-cuda-graph", _GRAPHS),
    Refusal("--cuda-graph-impl", "cuda_graph_impl", _GRAPHS, "leave it out", ("none",)),
    _leave_out("--optimizer-cpu-offload", _OFFLOAD),
    _leave_out("--cpu-offloading-num-layers", _OFFLOAD),
    _leave_out("--fine-grained-activation-offloading", _OFFLOAD),
    _leave_out("--moe-paged-stash", _OFFLOAD),
    _leave_out("--use-megatron-fsdp", _FSDP),
    _leave_out("--use-torch-fsdp2", _FSDP),
    _leave_out("--use-nccl-ub", _NCCL, "nccl_ub"),
    _leave_out("--nccl-communicator-config-path", _NCCL),
    _leave_out("--pipeline-model-parallel-comm-backend", _NCCL),
    _leave_out("--use-sharp", _NCCL),
    _leave_out("--moe-grouped-gemm", "a grouped matrix product for GPUs"),
    Refusal(
        "--moe-token-dispatcher-type",
        "moe_token_dispatcher_type",
        "communication kernels for GPUs",
        "use --moe-token-dispatcher-type alltoall",
        ("allgather", "alltoall"),
    ),
    _leave_out("--moe-enable-deepep", "communication kernels for GPUs"),
    _leave_out("--batch-invariant-mode", "kernels for GPUs"),
    _leave_out("--perform-rl-step", "Megatron's inference engine, which runs on a GPU"),
    _leave_out("--record-memory-history", "GPU memory to record"),
    _leave_out("--gpu-sniff-test-interval", "a GPU to test"),
    _leave_out("--log-energy", "a GPU's energy counter"),
    _leave_out("--yaml-cfg", "arguments that default to a GPU's, where flags have a CPU's"),
)


def refusal(arguments: argparse.Namespace, rules: Iterable[Refusal] = REFUSALS) -> str | None:
    """The sentence that refuses ``arguments`` on a CPU, or None if they can work."""
    for rule in rules:
        message = rule.message(arguments)
        if message is not None:
            return message
    return _refused_together(arguments)


def _refused_together(arguments: argparse.Namespace) -> str | None:
    """The sentence that refuses a combination of flags, or None."""

    def given(destination: str) -> bool:
        return bool(getattr(arguments, destination, None))

    if given("profile") and not given("use_pytorch_profiler"):
        return (
            "--profile needs the CUDA profiler, and this run is on the CPU: add "
            "--use-pytorch-profiler."
        )
    for module in getattr(arguments, "recompute_modules", None) or ():
        if module in _RECOMPUTED_BY_ENGINE:
            rule = _leave_out("--recompute-modules", _ENGINE)
            return rule.sentence(f"{rule.flag} {module}")
    return None


def set_defaults(parser: argparse.ArgumentParser) -> None:
    """Give Megatron's ``parser`` the defaults of a CPU.

    Raises:
        HostError: This Megatron has no such flag.
    """
    known = {action.dest for action in parser._actions}
    for flag, (destination, value) in _DEFAULTS.items():
        if releases.lacks(destination):
            continue
        if destination not in known:
            raise HostError(
                f"Training on the CPU sets {flag}, which this version of Megatron-LM does not "
                f"have: use core_v0.19.0."
            )
        parser.set_defaults(**{destination: value})


def install() -> None:
    """Make Megatron's parser take the defaults, and its validation refuse what cannot work."""
    wrap("megatron.training.arguments", "add_megatron_arguments", _with_defaults)
    wrap("megatron.training.arguments", "parse_args", _with_check)
    wrap("megatron.training.arguments", "validate_args", _with_check_and_attention)


def _check(arguments: argparse.Namespace) -> None:
    here = [_leave_out(flag, needs) for flag, needs in releases.refused_flags().items()]
    message = refusal(arguments, (*REFUSALS, *here))
    if message is not None:
        raise SystemExit(f"megatron_came: {message}")


def _with_defaults(original: Function) -> Function:
    def add_megatron_arguments(
        parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
    ) -> argparse.ArgumentParser:
        parser = original(parser, *args, **kwargs)
        set_defaults(parser)
        return parser

    return add_megatron_arguments


def _with_check(original: Function) -> Function:
    def parse_args(*args: Any, **kwargs: Any) -> argparse.Namespace:
        arguments: argparse.Namespace = original(*args, **kwargs)
        _check(arguments)  # those of a file are not validated below
        return arguments

    return parse_args


def _with_check_and_attention(original: Function) -> Function:
    def validate_args(arguments: argparse.Namespace, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.transformer.enums import AttnBackend

        _check(arguments)  # a checkpoint's may have been added
        if arguments.attention_backend == AttnBackend.local and not arguments.spec:
            # Local layers have one attention, whatever its name; Megatron 0.19 wants a --spec for
            # this name that it cannot build.
            arguments.attention_backend = AttnBackend.unfused
        return original(arguments, *args, **kwargs)

    return validate_args
