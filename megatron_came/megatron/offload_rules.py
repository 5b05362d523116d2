"""What --optimizer-cpu-offload does not go with, where CAME is the optimizer."""

from __future__ import annotations

from typing import Any

from megatron_came.rules import Rule

_FLAG = "--optimizer-cpu-offload"
_ONE = "leave one of them out"


def _offloads(settings: Any) -> bool:
    return bool(getattr(settings, "optimizer_cpu_offload", False))


def _is_outside(settings: Any) -> bool:
    return _offloads(settings) and not 0 <= getattr(settings, "optimizer_offload_fraction", 0) <= 1


def _is_whole(settings: Any) -> bool:
    return _offloads(settings) and not getattr(settings, "use_distributed_optimizer", False)


OFFLOAD_RULES = (
    *(
        Rule(
            f"--optimizer came: {{given}} does not go with {_FLAG}: {remedy}.", flag, when=_offloads
        )
        for flag, remedy in (
            ("--use-megatron-fsdp", _ONE),
            ("--use-torch-fsdp2", _ONE),
            ("--rl-offload-optimizer-during-inference", _ONE),
            # They look at main weights, and expect them on a GPU.
            ("--log-params-norm", "leave it out"),
            ("--qk-clip", "leave it out"),
            ("--fp8-param-gather", _ONE),
            # The process that writes would see tensors of a CPU change: they are not copied.
            ("--async-save", "leave it out"),
        )
    ),
    Rule(
        f"--optimizer came: {_FLAG} needs the distributed optimizer: add "
        f"--use-distributed-optimizer, or leave {_FLAG} out.",
        when=_is_whole,
    ),
    Rule(
        "--optimizer-offload-fraction {at.optimizer_offload_fraction} is not allowed: it must be "
        "from 0 to 1.",
        when=_is_outside,
    ),
)
