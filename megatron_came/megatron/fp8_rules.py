"""What weights in fp8 do not go with: Megatron quantises them from fp32 main weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_came.rules import Rule
from megatron_came.versions import before

_FP8 = "--fp8-param-gather"
_REUSED = "--reuse-grad-buf-for-mxfp8-param-ag"
_REMAINDER = "--came-main-params remainder"


def _has(*names: str) -> Callable[[Any], bool]:
    """Return a condition: one of these settings is given."""
    return lambda settings: any(getattr(settings, name, None) for name in names)


def _in_fp8(condition: Callable[[Any], object]) -> Callable[[Any], bool]:
    """Return a condition: the weights are to be in fp8, and another condition holds."""
    return lambda settings: _has("fp8_param_gather")(settings) and bool(condition(settings))


def _overwrites_gradients(settings: Any) -> bool:
    """Whether the step writes weights where gradients are."""
    is_reused = _has("reuse_grad_buf_for_mxfp8_param_ag")(settings)
    return is_reused and not _has("overlap_param_gather")(settings)


RULES = (
    Rule(
        "--optimizer came does not go with {given}, with whose weights neither its step nor its "
        "checkpoints have been tested: leave it out, and weights are gathered in bf16.",
        "--fp4-param-gather",
    ),
    Rule(
        f"{_FP8} needs the distributed optimizer, without FSDP: add --use-distributed-optimizer, "
        f"or leave {_FP8} out.",
        when=_in_fp8(
            lambda settings: (
                not _has("use_distributed_optimizer")(settings)
                or _has("use_megatron_fsdp", "use_torch_fsdp2")(settings)
            )
        ),
    ),
    Rule(
        f"{_FP8} needs --bf16, for what is not in fp8: add it, or leave {_FP8} out.",
        when=_in_fp8(lambda settings: not _has("bf16")(settings)),
    ),
    Rule(
        f"{_REMAINDER} completes bf16 weights, and {_FP8} keeps fp8 ones: leave one of them out.",
        when=_in_fp8(lambda settings: settings.came_main_params == "remainder"),
    ),
    Rule(
        f"{{given}} does not go with {_FP8}, whose weights it saves as Transformer Engine's own "
        "objects, which are not read here: use torch_dist.",
        "--ckpt-format",
        works=("torch_dist",),
        when=_in_fp8(_has("save", "load")),
    ),
    *(
        Rule(
            f"{{given}} does not go with {_FP8}, {why}: leave one of them out.",
            flag,
            when=_has("fp8_param_gather"),
        )
        for flag, why in (
            ("--came-report-memory", "whose weights it does not measure"),
            ("--qk-clip", "whose weights it writes, which has not been tested"),
        )
    ),
    Rule(
        f"{{given}} does not go with {_REUSED} without --overlap-param-gather, whose weights are "
        "written over the gradients that it looks at: add --overlap-param-gather, or leave one of "
        "them out.",
        "--came-log-diagnostics",
        when=_overwrites_gradients,
    ),
    Rule(
        f"--optimizer came does not go with {_REUSED} and experts on Megatron {{release}}, which "
        "overwrites their gradients before their step: use Megatron 0.18, add "
        f"--overlap-param-gather, or leave {_REUSED} out.",
        when=lambda settings: (
            _overwrites_gradients(settings) and _has("num_moe_experts", "num_experts")(settings)
        ),
        releases=before("0.18"),
    ),
)
