"""What --optimizer came does not go with: on the command line, and where it is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_came.core.momentum import MOMENTUM_DTYPES
from megatron_came.dtensors import is_dtensor
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.fp8_rules import RULES as FP8_RULES
from megatron_came.megatron.fsdp_rules import MEGATRON_FSDP_RULES, SHARDING, has_checkpoints
from megatron_came.megatron.offload_rules import OFFLOAD_RULES
from megatron_came.rules import Rule, refusal, value
from megatron_came.versions import before

# Values of CAME's flags that are looked at here: argparse would print all of Megatron's flags
# before its sentence.
CHOICES = {
    "--came-momentum-dtype": tuple(MOMENTUM_DTYPES),
    "--came-main-params": ("fp32", "remainder"),
}

_REMAINDER = "--came-main-params remainder"
_LEAVE_OUT = "leave it out, or use --optimizer adam"
_SEPARATE = "leave it out: CAME has statistics of its own for each expert"
_SHARDS = "leave it out and use --tensor-model-parallel-size"
_EXPERT_SHARDS = "leave it out and use --expert-tensor-parallel-size"


def _not_with(flag: str, remedy: str, what: str = "{given}", **more: Any) -> Rule:
    return Rule(f"--optimizer came does not go with {what}: {remedy}.", flag, **more)


def _has_remainders(settings: Any) -> bool:
    return bool(settings.came_main_params == "remainder")


def _has(weights: str) -> Callable[[Any], bool]:
    """Return a condition: remainders, and weights of a dtype that they cannot complete."""
    return lambda settings: (
        _has_remainders(settings)
        and not settings.bf16
        and bool(settings.fp16) == (weights == "fp16")
    )


def _cut_offsets(settings: Any) -> bool:
    """Whether attention learns offsets, which tensor parallelism cuts without saying so."""
    learns = value("softmax_type")(settings) == "learnable"
    return learns and bool(settings.tensor_model_parallel_size > 1)


def _is_mimo(settings: Any) -> bool:
    model = next(iter(getattr(settings, "model_chunks", ())), None)
    if model is None:
        return False  # on the command line
    from megatron.core.models.mimo.model.base import MimoModel

    while not isinstance(model, MimoModel) and hasattr(model, "module"):
        model = model.module  # out of its wrappers
    return isinstance(model, MimoModel)


# Experts whose layout a release before 0.19 does not say.


def _experts(settings: Any) -> Iterator[Any]:
    """All modules that hold the experts of a layer."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    if value("num_moe_experts")(settings):
        for chunk in getattr(settings, "model_chunks", ()):
            for module in chunk.modules():
                if isinstance(module, BaseMoELayer):
                    yield module.experts


def _reduces_experts_wrongly(settings: Any) -> bool:
    return bool(
        value("num_moe_experts")(settings)
        and settings.expert_model_parallel_size == 1
        and settings.expert_tensor_parallel_size != settings.tensor_model_parallel_size
    )


def _packs_experts(settings: Any) -> bool:
    return any(type(experts).__name__ == "GroupedMLP" for experts in _experts(settings))


def _cuts_experts_in_silence(settings: Any) -> bool:
    return any(
        base.__module__.split(".")[0] == "transformer_engine"
        for experts in _experts(settings)
        for module in experts.modules()
        for base in type(module).__mro__
    )


# FSDP2: what Megatron asserts in many words, and what has no place in its checkpoints.
_FSDP2 = "--use-torch-fsdp2"


def _beside_fsdp2(flag: str, remedy: str, **more: Any) -> Rule:
    sentence = f"{{given}} does not go with {_FSDP2}: {remedy}."
    return Rule(sentence, flag, when=value("use_torch_fsdp2"), **more)


def _fsdp2_saves_unlike_rows(settings: Any) -> bool:
    """Whether FSDP2 cuts weights so that Megatron cannot save them.

    That is into unlike numbers of rows, or with rows of both of SwiGLU's projections on a rank.
    """
    needs_names = value("came_momentum_dtype")(settings) != "fp32"
    if not (value("use_torch_fsdp2")(settings) and (has_checkpoints(settings) or needs_names)):
        return False
    params = (p for chunk in getattr(settings, "model_chunks", ()) for p in chunk.parameters())
    cuts = {(len(p), p.device_mesh.size()) for p in params if is_dtensor(p) and p.dim()}
    halves = 2 if value("gated_linear_unit")(settings) else 1
    return any(rows % size or (size > 1 and size % halves) for rows, size in cuts)


_OLDER = {"releases": before("0.19")}

RULES = (
    *(
        Rule("{given} is not allowed: use " + " or ".join(values) + ".", flag, works=values)
        for flag, values in CHOICES.items()
    ),
    *OFFLOAD_RULES,
    _not_with("--use-precision-aware-optimizer", _LEAVE_OUT),
    *MEGATRON_FSDP_RULES,
    _not_with("--optimizer-cuda-graph", _LEAVE_OUT),
    *FP8_RULES,
    # Megatron's validation derives these two from the flags.
    _not_with(
        "--tensor-parallel-num-weight-shards",
        _SHARDS,
        argument="gtp_weight_remat_size",
        works=(1,),
    ),
    _not_with(
        "--expert-tensor-parallel-num-weight-shards",
        _EXPERT_SHARDS,
        argument="expert_gtp_weight_remat_size",
        works=(1,),
    ),
    _not_with("--moe-single-grouped-weight", _SEPARATE),
    _not_with("--moe-single-grouped-bias", _SEPARATE),
    _not_with("--use-layer-wise-distributed-optimizer", SHARDING, "a layer-wise optimizer"),
    _not_with("--use-legacy-models", "leave it out"),
    _not_with("--yaml-cfg", "give the settings as flags"),
    Rule(
        "{given} does not go with --dist-ckpt-optim-fully-reshardable, whose optimizer state "
        "Megatron cannot save locally: leave that out, or use --non-persistent-ckpt-type global.",
        "--non-persistent-ckpt-type",
        works=("global",),
        when=lambda settings: (
            value("dist_ckpt_optim_fully_reshardable")(settings)
            and value("use_distributed_optimizer")(settings)
        ),
    ),
    Rule(
        "{given} and --use-checkpoint-opt_param-scheduler ask for the schedule of the flags and of "
        "the checkpoint: leave one of them out.",
        "--override-opt_param-scheduler",
        when=value("use_checkpoint_opt_param_scheduler"),
    ),
    Rule(
        "{given} asks Megatron to hand back what a checkpoint lacks, which its training loop does "
        "not take: leave it out.",
        "--dist-ckpt-strictness",
        when=lambda settings: settings.dist_ckpt_strictness.startswith("return_"),
    ),
    _not_with(
        "",
        "use another --softmax-type, or size 1",
        "--softmax-type learnable at --tensor-model-parallel-size above 1",
        when=_cut_offsets,
    ),
    *(
        Rule(
            f"{_REMAINDER} completes bf16 weights, and the model's are {weights}: add --bf16, or "
            f"leave {_REMAINDER} out.",
            when=_has(weights),
        )
        for weights in ("fp16", "fp32")
    ),
    Rule(
        f"{_REMAINDER} needs the distributed optimizer: add --use-distributed-optimizer, or leave "
        f"{_REMAINDER} out.",
        when=lambda settings: _has_remainders(settings) and not settings.use_distributed_optimizer,
    ),
    *(  # they ask for main weights in fp32
        Rule(
            f"{_REMAINDER} does not go with {flag}: leave one of them out.",
            flag,
            when=_has_remainders,
        )
        for flag in ("--load-main-params-from-ckpt", "--log-params-norm", "--qk-clip")
    ),
    Rule(
        "--came-spike-guard {at.came_spike_guard} is not allowed: it must be a finite number above "
        "1.",
        when=lambda settings: (
            (factor := value("came_spike_guard")(settings)) is not None
            and not 1.0 < factor < math.inf
        ),
    ),
    Rule(
        "--came-log-diagnostics writes to TensorBoard and W&B: add --tensorboard-dir or "
        "--wandb-project, or leave it out.",
        "--came-log-diagnostics",
        when=lambda settings: (
            not (value("tensorboard_dir")(settings) or value("wandb_project")(settings))
        ),
    ),
    *(
        _beside_fsdp2(flag, remedy, works=works)
        for flag, remedy, works in (
            ("--pipeline-model-parallel-size", "use 1", (1,)),
            ("--expert-model-parallel-size", "use 1", (1,)),
            ("--use-distributed-optimizer", "leave one of them out", ()),
            ("--came-rule", "leave it out", ()),
            ("--fp16", "use --bf16", ()),
            ("--ckpt-format", "use torch_dist", ("torch_dist",)),
            ("--non-persistent-ckpt-type", "use global", ("global",)),
            ("--rl-offload-optimizer-during-inference", "leave it out", ()),
            ("--came-report-memory", "leave it out", ()),
        )
    ),
    Rule(
        f"{_FSDP2} needs weights of their own for embeddings and output: add "
        "--untie-embeddings-and-output-weights.",
        when=lambda settings: (
            value("use_torch_fsdp2")(settings)
            and not getattr(settings, "untie_embeddings_and_output_weights", True)
        ),
    ),
    Rule(
        "{given} is not supported with "
        f"{_FSDP2} at --tensor-model-parallel-size above 1, where its random bits would depend on "
        "the layout: leave it out, or use size 1.",
        "--came-momentum-dtype",
        works=("fp32",),
        when=lambda settings: (
            value("use_torch_fsdp2")(settings) and settings.tensor_model_parallel_size > 1
        ),
    ),
    # Where it is built.
    Rule(
        f"{_FSDP2} cuts weights at this data-parallel size into unlike numbers of rows, or across "
        "the two projections of SwiGLU, and for that Megatron's checkpoints have no place: use a "
        "size that divides the rows of every weight and with SwiGLU is even, or leave --save and "
        "--load out and --came-momentum-dtype at fp32.",
        when=_fsdp2_saves_unlike_rows,
    ),
    Rule(
        f"{_FSDP2} on Megatron {{release}} saves the two projections of SwiGLU in the wrong order: "
        "leave it out, leave --save and --load out, or use Megatron 0.19.",
        when=lambda settings: (
            value("use_torch_fsdp2")(settings)
            and value("gated_linear_unit")(settings)
            and has_checkpoints(settings)
        ),
        releases=_OLDER["releases"],
    ),
    Rule(
        "--optimizer came does not support MiMo models, which build their own optimizers: use "
        "--optimizer adam.",
        when=_is_mimo,
    ),
    Rule(
        "--optimizer came has decoupled weight decay only: leave decoupled_weight_decay on.",
        when=lambda settings: not getattr(settings, "decoupled_weight_decay", True),
    ),
    _not_with(
        "--expert-tensor-parallel-size",
        "use --expert-tensor-parallel-size {at.tensor_model_parallel_size}, or Megatron 0.19",
        "{given} at --tensor-model-parallel-size {at.tensor_model_parallel_size} and "
        "--expert-model-parallel-size 1 on Megatron {release}, which reduces the gradients of such "
        "experts over the wrong ranks",
        when=_reduces_experts_wrongly,
        **_OLDER,
    ),
    _not_with(
        "",
        "use --transformer-impl transformer_engine without --moe-use-legacy-grouped-gemm, leave "
        "--moe-grouped-gemm out, or Megatron 0.19",
        "--moe-grouped-gemm where Megatron {release} packs all experts of a rank into one weight "
        "(its legacy GroupedMLP)",
        when=_packs_experts,
        **_OLDER,
    ),
    _not_with(
        "--expert-tensor-parallel-size",
        "use --expert-tensor-parallel-size 1 with --expert-model-parallel-size above 1, "
        "--transformer-impl local, or Megatron 0.19",
        "{given} and --transformer-impl transformer_engine on Megatron {release}, whose expert "
        "layers do not say how they are cut",
        works=(1,),
        when=_cuts_experts_in_silence,
        **_OLDER,
    ),
)


def refuse(settings: Any) -> None:
    """Refuse what does not go with CAME.

    Args:
        settings: Megatron's arguments, or what :func:`.builder.settings_of_model` returns.

    Raises:
        UnsupportedError: one sentence with flag, value and remedy.
    """
    problem = refusal(RULES, settings)
    if problem is not None:
        raise UnsupportedError(problem)
