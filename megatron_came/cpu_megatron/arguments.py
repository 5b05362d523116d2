"""Megatron's flags on a CPU: defaults that work, and one sentence for each value that cannot.

The defaults are set in Megatron's own argument parser, so a flag that is given wins over them.
What cannot work is refused by value, before Megatron looks at the arguments: no default is refused,
so a refused value was asked for, on the command line or by the arguments of a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from megatron_came.cpu_megatron.rules import RULES
from megatron_came.patching import Function, around
from megatron_came.rules import stop_if_refused
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


@around
def with_defaults(
    original: Function, parser: ArgumentParser, *args: Any, **kwargs: Any
) -> ArgumentParser:
    """Let a function that adds Megatron's flags to a parser set the defaults of a CPU.

    Raises:
        MegatronError: this Megatron has no such flag.
    """
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


@around
def with_check(original: Function, *args: Any, **kwargs: Any) -> Namespace:
    """Let Megatron's parsing refuse what cannot work: the flags of a file are not validated."""
    arguments: Namespace = original(*args, **kwargs)
    stop_if_refused(RULES, arguments)
    return arguments


@around
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
    with _connections(arguments):
        return original(arguments, *args, **kwargs)


@contextlib.contextmanager
def _connections(arguments: Namespace) -> Iterator[None]:
    """Have another number of a GPU's queues for FSDP than Megatron insists on for others.

    A CPU has none, and the process may train with tensor parallelism next.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    given = os.environ[name]
    if (arguments.use_torch_fsdp2 or arguments.use_megatron_fsdp) and given == "1":
        os.environ[name] = "8"
    try:
        yield
    finally:
        os.environ[name] = given
