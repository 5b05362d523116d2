"""What --optimizer came does not go with where Megatron-FSDP holds the model."""

from __future__ import annotations

from typing import Any

import torch

from megatron_came.rules import Rule, value
from megatron_came.versions import SUPPORTED

SHARDING = "use --use-distributed-optimizer, which shards CAME's momentum and main weights"


def has_checkpoints(settings: Any) -> bool:
    """Whether a run saves or loads."""
    return bool(value("save")(settings) or value("load")(settings))


_has_fsdp = value("use_megatron_fsdp")
# What has not been shown to be exact, or does not work, with Megatron-FSDP: flag, what is allowed,
# what to do, and the flag's name among the settings where it is another.
_NOT_WITH_FSDP: tuple[tuple[Any, ...], ...] = (
    ("--num-distributed-optimizer-instances", (1,), "use 1"),
    ("--pipeline-model-parallel-size", (1,), SHARDING),
    ("--num-experts", (), SHARDING, "num_moe_experts"),
    ("--fp16", (), "use --bf16"),
    ("--loss-scale", (), "leave it out"),
    ("--fp8-format", (), "leave it out", "fp8"),
    ("--fp4-format", (), "leave it out", "fp4"),
    ("--cuda-graph-impl", ("none",), "use none"),
    ("--init-model-with-meta-device", (), "leave it out"),
    ("--use-nccl-ub", (), "leave it out", "nccl_ub"),
    ("--qk-clip", (), "leave it out"),
    ("--rl-offload-optimizer-during-inference", (), "leave it out"),
    ("--came-momentum-dtype", ("fp32",), "use fp32"),
    ("--came-main-params", ("fp32",), "use fp32"),
    ("--non-persistent-ckpt-type", (), "leave it out"),
    ("--async-save", (), "leave it out"),
    ("--came-rule", (), "leave it out"),
)


def _has_other_main_weights(settings: Any) -> bool:
    """Whether Megatron-FSDP is to keep main weights in another dtype; None is the model's."""
    dtype = getattr(settings, "megatron_fsdp_main_params_dtype", "fp32")
    return _has_fsdp(settings) and dtype not in ("fp32", torch.float32)


MEGATRON_FSDP_RULES = (
    Rule(
        "--optimizer came does not go with {given} on Megatron {release}: "
        f"{SHARDING}, or Megatron 0.19.",
        "--use-megatron-fsdp",
        releases=tuple(each for each in SUPPORTED if each != "0.19"),
    ),
    Rule(
        "{given} needs --ckpt-format fsdp_dtensor, also where nothing is saved: add it.",
        "--use-megatron-fsdp",
        when=lambda settings: value("ckpt_format")(settings) not in (None, "fsdp_dtensor"),
    ),
    *(
        Rule(
            f"--optimizer came does not go with --use-megatron-fsdp and {{given}}: {remedy}.",
            flag,
            works=works,
            when=_has_fsdp,
            argument="".join(argument),
        )
        for flag, works, remedy, *argument in _NOT_WITH_FSDP
    ),
    Rule(
        "--optimizer came does not go with --use-megatron-fsdp and another "
        "--megatron-fsdp-main-params-dtype than fp32: use that.",
        when=_has_other_main_weights,
    ),
    Rule(
        "Megatron cannot save the two projections of {given} with --use-megatron-fsdp at "
        "--data-parallel-sharding-strategy no_shard: use optim, or leave --save and --load out.",
        "--swiglu",
        when=lambda settings: (
            _has_fsdp(settings)
            and value("data_parallel_sharding_strategy")(settings) == "no_shard"
            and has_checkpoints(settings)
        ),
    ),
)
