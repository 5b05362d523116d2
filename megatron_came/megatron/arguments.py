"""``--optimizer came`` and its flags in Megatron's command line."""

import argparse
import math
import sys
from collections.abc import Iterable
from typing import Any

from megatron_came.core.hyperparameters import TABLE, HyperparameterError, Hyperparameters
from megatron_came.kernels.dispatch import CHOICES as KERNELS
from megatron_came.megatron import parameter_rules, rules, warmup
from megatron_came.megatron.checkpoints.refusals import notice
from megatron_came.megatron.errors import refused_by_megatron
from megatron_came.patching import Function
from megatron_came.rules import flag_of, name_of
from megatron_came.voice import say, stop

# CAME's flags, with what argparse is told of them.
FLAGS: dict[str, dict[str, Any]] = {
    **{
        flag_of(f"came_{row.name}"): {"action": "store_true", "help": row.help}
        if row.type is bool
        else {
            "type": row.type,
            "default": row.default,
            "help": f"{row.help} (default: {row.default:g})",
        }
        for row in TABLE
    },
    "--came-kernels": {
        "choices": KERNELS,
        "default": "auto",
        "help": "who computes CAME's step: auto is triton on GPUs and numba on CPUs, where they "
        "are installed, otherwise plain PyTorch (default: auto)",
    },
    "--came-cuda-graph": {
        "action": "store_true",
        "help": "replay the launches of CAME's kernels on GPUs as CUDA graphs, once they have "
        "stayed the same for a few steps",
    },
    "--came-momentum-dtype": {
        "metavar": "|".join(rules.CHOICES["--came-momentum-dtype"]),
        "default": "fp32",
        "help": "CAME's momentum: bf16 halves its memory, int8 with a scale for every 256 "
        "elements quarters it; both are rounded stochastically (default: fp32)",
    },
    "--came-main-params": {
        "metavar": "|".join(rules.CHOICES["--came-main-params"]),
        "default": "fp32",
        "help": "main weights of a bf16 model: remainder keeps of each the 16 bits that the bf16 "
        "weight lacks, half the memory and the same fp32 value (default: fp32)",
    },
    "--came-log-diagnostics": {
        "action": "store_true",
        "help": "write figures of CAME's steps by kind of layer to TensorBoard and W&B, every "
        "--log-interval iterations",
    },
    "--came-spike-guard": {
        "type": float,
        "default": None,
        "metavar": "FACTOR",
        "help": "skip a step whose raw update has FACTOR times the root mean square that is the "
        "median of the last 128 steps",
    },
    parameter_rules.FLAG: {
        "action": "append",
        "nargs": "+",
        "default": None,
        "metavar": "PATTERN NAME=VALUE",
        "help": "other hyperparameters for parameters whose names match, as '*.bias' beta2=0.99; "
        "factored=no gives matrices a whole second moment; may be given several times",
    },
    "--came-no-verify": {
        "action": "store_true",
        "help": "load a checkpoint without comparing it with the digests that were saved with it",
    },
}

# Settings of another optimizer that shared argument lists often hold: said to be ignored. So are
# two of Megatron's for offload: CAME has its own kernels, and wants all gradients before it begins.
_IGNORED = (
    *("--adam-", "--sgd-", "--muon-", "--adaptive-muon-", "--lion-", "--soap-"),
    *("--overlap-cpu-optimizer-d2h-h2d", "--use-torch-optimizer-for-cpu-offload"),
)


# Numbers of Megatron's that are no schedule of CAME's if negative or not finite.
_RATES = (
    *("lr", "min_lr", "lr_warmup_init", "lr_warmup_fraction", "decoupled_lr", "decoupled_min_lr"),
    *("weight_decay", "start_weight_decay", "end_weight_decay"),
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
        return Hyperparameters(**{row.name: getattr(args, f"came_{row.name}") for row in TABLE})
    except HyperparameterError as error:
        raise ValueError(error.said_of(flag_of(f"came_{error.name}"))) from error


def check(args: argparse.Namespace, flags: list[str]) -> None:
    """Refuse arguments, validated or not, and given flags that do not go with the optimizer.

    Raises:
        ValueError: one sentence with flag, value and remedy.
    """
    if args.optimizer == "came":
        hyperparameters(args)
        for name in _RATES:
            if (value := getattr(args, name, None)) is not None and not 0 <= value < math.inf:
                what = "it must be a finite number at least 0"
                raise ValueError(f"{flag_of(name)} {value} is not allowed: {what}.")
        parameter_rules.parsed(getattr(args, "came_rule", None))  # raises what is wrong with them
        rules.refuse(args)
        return
    stray = next((flag for flag in flags if flag in FLAGS), None)
    if stray is not None:
        raise ValueError(
            f"{stray} is a setting of CAME, but the optimizer is {args.optimizer}: "
            f"add --optimizer came, or leave {stray} out."
        )


def use_came(args: argparse.Namespace) -> None:
    """Let a host train with CAME that has validated Megatron's arguments, for Adam, by itself.

    slime calls it for ``--custom-megatron-init-path megatron_came.use_came``. Attributes of
    ``args`` that are named as CAME's flags are its settings.

    Raises:
        ValueError: another optimizer, or settings that do not go with CAME.
    """
    if args.optimizer not in ("adam", "came"):
        raise ValueError(
            f"megatron_came.use_came: Megatron has validated --optimizer {args.optimizer}, which "
            "is not sharded as CAME is: give --optimizer adam, in whose place CAME comes."
        )
    for flag, settings in FLAGS.items():
        if not hasattr(args, name_of(flag)):
            setattr(args, name_of(flag), settings.get("default", False))
    args.optimizer = "came"
    check(args, [])
    say("--optimizer adam: CAME takes its place, as megatron_came.use_came was called.")


def with_flags(
    original: Function, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    """Let a function that adds Megatron's flags to a parser add CAME's as well."""
    parser = original(parser, *args, **kwargs)
    choice = next(action for action in parser._actions if action.dest == "optimizer")
    choice.choices = [*(choice.choices or ()), "came"]
    group = parser.add_argument_group(title="CAME")
    for flag, settings in FLAGS.items():
        group.add_argument(flag, **settings)
    _escape_percent_signs(parser)
    return parser


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    """Mend help texts of Megatron's with which ``--help`` would end in a stack trace."""
    for action in parser._actions:
        try:
            str(action.help) % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):  # of a bare %
            action.help = str(action.help).replace("%", "%%")


def with_checks(original: Function, args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
    """Let Megatron validate CAME as it does Adam, and refuse what does not go with it."""
    flags = given_flags(sys.argv[1:])
    _stop_if_refused(args, flags)  # before Megatron's own assertions, which say less
    if args.optimizer != "came":
        return in_a_sentence(original, args, *rest, **kwargs)
    ignored = [flag for flag in flags if flag.startswith(_IGNORED)]
    if ignored:
        say(f"--optimizer came ignores {', '.join(ignored)}.")
    # Megatron turns the distributed optimizer into a layer-wise one for every name that it
    # does not know.
    args.optimizer = "adam"
    # It wants Adam's precision-aware form for offload, which CAME does without.
    offloads = getattr(args, "optimizer_cpu_offload", False)
    args.optimizer_cpu_offload = False
    try:
        result = in_a_sentence(original, args, *rest, **kwargs)
    finally:
        args.optimizer, args.optimizer_cpu_offload = "came", offloads
    _stop_if_refused(args, flags)  # and what validation has made of them
    for sentence in (warmup.warning(args, hyperparameters(args)), notice(args)):
        if sentence is not None:
            say(sentence)
    return result


def in_a_sentence(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Let Megatron's validation end in a sentence: the first thing that newcomers meet."""
    try:
        return original(*args, **kwargs)
    except (AssertionError, ValueError) as error:
        stop(refused_by_megatron(error), error)


def _stop_if_refused(args: argparse.Namespace, flags: list[str]) -> None:
    try:
        check(args, flags)
    except ValueError as error:
        stop(str(error), error)
