"""``--optimizer came`` and its flags in Megatron's command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from megatron_came.core.hyperparameters import HyperparameterError, Hyperparameters
from megatron_came.core.state import MOMENTUM_DTYPES
from megatron_came.kernels.dispatch import CHOICES
from megatron_came.megatron import warmup
from megatron_came.megatron.checkpoints.refusals import notice
from megatron_came.megatron.patching import Function, wrap
from megatron_came.memory import report as memory_report

_HELP = {
    "beta1": "decay of CAME's momentum",
    "beta2": "decay of CAME's squared-gradient statistics",
    "beta3": "decay of CAME's instability statistics; there is no bias correction, so with the "
    "default the first updates are up to 11 times the learning rate in RMS: warm up",
    "eps1": "added to the squared gradient",
    "eps2": "added to the squared residual",
    "clip_threshold": "largest root mean square of an update before momentum",
}

# Checked here and not by argparse, which would print all of Megatron's flags before its sentence.
_CHOICES = {
    "came_momentum_dtype": tuple(MOMENTUM_DTYPES),
    "came_main_params": ("fp32", "remainder"),
}

# Settings of another optimizer that shared argument lists often hold: said to be ignored.
_IGNORED = ("--adam-", "--sgd-", "--muon-", "--adaptive-muon-", "--lion-", "--soap-")


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A flag that does not go with CAME.

    Attributes:
        dest: its name among Megatron's arguments.
        flag: as it is typed.
        remedy: what to do instead.
        harmless: the values that do go with CAME.
        shown: another argument that holds the value as the user typed it.
    """

    dest: str
    flag: str
    remedy: str
    harmless: tuple[object, ...] = (None, False)
    shown: str | None = None

    def problem(self, args: argparse.Namespace) -> str | None:
        """One sentence, if ``args`` holds another value."""
        value = getattr(args, self.dest, None)
        if value in self.harmless:
            return None
        given = (
            self.flag if value is True else f"{self.flag} {getattr(args, self.shown or self.dest)}"
        )
        return f"--optimizer came does not go with {given}: {self.remedy}."


_LEAVE_OUT = "leave it out, or use --optimizer adam"
_SHARDING = "use --use-distributed-optimizer, which shards CAME's momentum and main weights"
_SEPARATE = "leave it out: CAME has statistics of its own for each expert"
UNSUPPORTED = (
    Unsupported("optimizer_cpu_offload", "--optimizer-cpu-offload", _LEAVE_OUT),
    Unsupported("use_precision_aware_optimizer", "--use-precision-aware-optimizer", _LEAVE_OUT),
    Unsupported("use_megatron_fsdp", "--use-megatron-fsdp", _SHARDING),
    Unsupported("use_torch_fsdp2", "--use-torch-fsdp2", _SHARDING),
    Unsupported("optimizer_cuda_graph", "--optimizer-cuda-graph", _LEAVE_OUT),
    Unsupported(
        "rl_offload_optimizer_during_inference",
        "--rl-offload-optimizer-during-inference",
        _LEAVE_OUT,
    ),
    Unsupported("fp8_param_gather", "--fp8-param-gather", "leave it out"),
    Unsupported("fp4_param_gather", "--fp4-param-gather", "leave it out"),
    Unsupported(
        "reuse_grad_buf_for_mxfp8_param_ag", "--reuse-grad-buf-for-mxfp8-param-ag", "leave it out"
    ),
    Unsupported(
        "gtp_weight_remat_size",  # Megatron's validation derives it from the flag
        "--tensor-parallel-num-weight-shards",
        "leave it out and use --tensor-model-parallel-size",
        (None, 1),
        "tensor_parallel_num_weight_shards",
    ),
    Unsupported(
        "expert_gtp_weight_remat_size",
        "--expert-tensor-parallel-num-weight-shards",
        "leave it out and use --expert-tensor-parallel-size",
        (None, 1),
        "expert_tensor_parallel_num_weight_shards",
    ),
    Unsupported("moe_single_grouped_weight", "--moe-single-grouped-weight", _SEPARATE),
    Unsupported("moe_single_grouped_bias", "--moe-single-grouped-bias", _SEPARATE),
    Unsupported("use_layer_wise_distributed_optimizer", "a layer-wise optimizer", _SHARDING),
    Unsupported("use_legacy_models", "--use-legacy-models", "leave it out"),
    Unsupported("yaml_cfg", "--yaml-cfg", "give the settings as flags"),
)


def given_flags(argv: Iterable[str]) -> list[str]:
    """Return the flags of a command line, in order, without their values."""
    return [word.split("=", 1)[0] for word in argv if word.startswith("--")]


def hyperparameters(args: argparse.Namespace) -> Hyperparameters:
    """Read CAME's hyperparameters from Megatron's arguments.

    Raises:
        ValueError: one is out of range; the message names the flag.
    """
    try:
        return Hyperparameters(
            **{f.name: getattr(args, f"came_{f.name}") for f in fields(Hyperparameters)}
        )
    except HyperparameterError as error:
        flag = "--came-" + error.name.replace("_", "-")
        raise ValueError(
            f"{flag} {error.value} is not allowed: it must be {error.allowed}."
        ) from error


def check(args: argparse.Namespace, flags: list[str]) -> None:
    """Refuse what does not go with the chosen optimizer.

    Args:
        args: Megatron's arguments, before or after its own validation.
        flags: the flags that were given.

    Raises:
        ValueError: one sentence with flag, value and remedy.
    """
    if args.optimizer != "came":
        own = (flag for flag in flags if flag.startswith("--came-"))
        stray = [flag for flag in own if flag not in memory_report.FLAGS]
        if stray:
            raise ValueError(
                f"{stray[0]} is a setting of CAME, but the optimizer is {args.optimizer}: "
                f"add --optimizer came, or leave {stray[0]} out."
            )
        return
    hyperparameters(args)
    problems = [problem for rule in UNSUPPORTED if (problem := rule.problem(args))]
    if problems:
        raise ValueError(problems[0])
    if getattr(args, "softmax_type", None) == "learnable" and args.tensor_model_parallel_size > 1:
        # Its offsets are cut by tensor parallelism and do not say so.
        raise ValueError(
            "--optimizer came does not go with --softmax-type learnable at "
            "--tensor-model-parallel-size above 1: use another --softmax-type, or size 1."
        )
    for name, allowed in _CHOICES.items():
        value = getattr(args, name)
        if value not in allowed:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is not allowed: use {' or '.join(allowed)}."
            )
    if args.came_main_params == "remainder":
        _check_remainders(args)


def _check_remainders(args: argparse.Namespace) -> None:
    flag = "--came-main-params remainder"
    if not args.bf16:
        weights = "fp16" if args.fp16 else "fp32"
        raise ValueError(
            f"{flag} completes bf16 weights, and the model's are {weights}: add --bf16, or leave "
            f"{flag} out."
        )
    if not args.use_distributed_optimizer:
        raise ValueError(
            f"{flag} needs the distributed optimizer: add --use-distributed-optimizer, or leave "
            f"{flag} out."
        )
    for name in ("load_main_params_from_ckpt", "log_params_norm", "qk_clip"):
        if getattr(args, name, False):  # they ask for main weights in fp32
            raise ValueError(
                f"{flag} does not go with --{name.replace('_', '-')}: leave one of them out."
            )


def install() -> None:
    """Let Megatron's parser know ``came`` and its flags, and its validation their limits."""
    wrap("megatron.training.arguments", "add_megatron_arguments", with_flags)
    wrap("megatron.training.arguments", "validate_args", _with_checks)


def with_flags(original: Function) -> Function:
    """Let a function that adds Megatron's flags to a parser add CAME's as well."""

    def add_megatron_arguments(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        choice = next(action for action in parser._actions if action.dest == "optimizer")
        choice.choices = [*(choice.choices or ()), "came"]
        group = parser.add_argument_group(title="CAME")
        for field in fields(Hyperparameters):
            group.add_argument(
                "--came-" + field.name.replace("_", "-"),
                type=float,
                default=field.default,
                help=f"{_HELP[field.name]} (default: {field.default:g})",
            )
        group.add_argument(
            "--came-kernels",
            choices=CHOICES,
            default="auto",
            help="who computes CAME's step: auto is triton on GPUs and numba on CPUs, where they "
            "are installed, otherwise plain PyTorch (default: auto)",
        )
        group.add_argument(
            "--came-momentum-dtype",
            metavar="|".join(_CHOICES["came_momentum_dtype"]),
            default="fp32",
            help="CAME's momentum: bf16 halves its memory, int8 with a scale for every 256 "
            "elements quarters it; both are rounded stochastically (default: fp32)",
        )
        group.add_argument(
            "--came-main-params",
            metavar="|".join(_CHOICES["came_main_params"]),
            default="fp32",
            help="main weights of a bf16 model: remainder keeps of each the 16 bits that the bf16 "
            "weight lacks, half the memory and the same fp32 value (default: fp32)",
        )
        group.add_argument(
            "--came-no-verify",
            action="store_true",
            help="load a checkpoint without comparing it with the digests that were saved with it",
        )
        memory_report.add_flags(group)
        _escape_percent_signs(parser)
        return parser

    return add_megatron_arguments


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    """Mend help texts of Megatron's with which ``--help`` would end in a stack trace."""
    for action in parser._actions:
        try:
            str(action.help) % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            action.help = str(action.help).replace("%", "%%")


def _with_checks(original: Function) -> Function:
    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        flags = given_flags(sys.argv[1:])
        _stop_if_refused(args, flags)
        if args.optimizer != "came":
            return original(args, *rest, **kwargs)
        ignored = [flag for flag in flags if flag.startswith(_IGNORED)]
        if ignored:
            _say(f"--optimizer came ignores {', '.join(ignored)}.")
        # Megatron turns the distributed optimizer into a layer-wise one for every name that it
        # does not know.
        args.optimizer = "adam"
        try:
            result = original(args, *rest, **kwargs)
        finally:
            args.optimizer = "came"
        _stop_if_refused(args, flags)
        young = warmup.warning(args, hyperparameters(args))
        if young:
            _say(young)
        reshardable = notice(args)
        if reshardable:
            _say(reshardable)
        return result

    return validate_args


_said: set[str] = set()


def say_once(sentence: str) -> None:
    """Print a sentence on rank 0, if it has not been printed yet."""
    if sentence not in _said:
        _said.add(sentence)
        _say(sentence)


def _say(sentence: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_came: {sentence}", flush=True)


def _stop_if_refused(args: argparse.Namespace, flags: list[str]) -> None:
    try:
        check(args, flags)
    except ValueError as error:
        raise SystemExit(f"megatron_came: {error}") from error
