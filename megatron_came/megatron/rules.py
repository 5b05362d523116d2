"""What --optimizer came does not go with: on the command line, and where it is built."""

import math
from collections.abc import Callable
from typing import Any

from megatron_came.core.momentum import MOMENTUM_DTYPES
from megatron_came.megatron import rule_conditions as conditions
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.rules import Rule, Settings, name_of, refusal
from megatron_came.versions import SUPPORTED, before

# Values of CAME's flags that are looked at here: argparse would print all of Megatron's flags
# before its sentence.
CHOICES = {
    "--came-momentum-dtype": tuple(MOMENTUM_DTYPES),
    "--came-main-params": ("fp32", "remainder"),
}

_REMAINDER, _OFFLOAD = "--came-main-params remainder", "--optimizer-cpu-offload"
_FP8, _REUSED = "--fp8-param-gather", "--reuse-grad-buf-for-mxfp8-param-ag"
_FSDP, _FSDP2 = "--use-megatron-fsdp", "--use-torch-fsdp2"
_SHARDING = "use --use-distributed-optimizer, which shards CAME's momentum and main weights"
_DISTRIBUTED = "the distributed optimizer: add --use-distributed-optimizer"
_ONE, _OUT = "leave one of them out", "leave it out"
_OLDER, _OTHER = before("0.19"), tuple(each for each in SUPPORTED if each != "0.19")
_BETWEEN = "--non-persistent-save-interval"


def _not_with(flag: str, remedy: str, what: str = "{given}", **more: Any) -> Rule:
    return Rule(f"--optimizer came does not go with {what}: {remedy}.", flag, **more)


def _beside(
    other: str, *rows: tuple[Any, ...], when: Callable[[Settings], object] | None = None
) -> tuple[Rule, ...]:
    """Refuse flags beside another one, which is given if its value or ``when`` says so.

    Rows have of each flag what to do, perhaps values that are not refused, and the flag's name
    among the settings where it is another.
    """
    return tuple(
        Rule(
            f"--optimizer came: {{given}} does not go with {other}: {remedy}.",
            flag,
            when=when or (lambda s: getattr(s, name_of(other))),
            **dict(zip(("works", "argument"), more, strict=False)),
        )
        for flag, remedy, *more in rows
    )


def _needs(what: str, needed: str, when: Callable[[Settings], object]) -> Rule:
    return Rule(f"--optimizer came: {what} needs {needed}, or leave {what} out.", when=when)


def _has_remainders(s: Settings) -> bool:
    return bool(s.came_main_params == "remainder")


RULES = (
    *(
        Rule("{given} is not allowed: use " + " or ".join(values) + ".", flag, works=values)
        for flag, values in CHOICES.items()
    ),
    *_beside(
        _OFFLOAD,
        (_FSDP, _ONE),
        (_FSDP2, _ONE),
        ("--rl-offload-optimizer-during-inference", _ONE),
        # They look at main weights, and expect them on a GPU.
        ("--log-params-norm", _OUT),
        ("--qk-clip", _OUT),
        (_FP8, _ONE),
        # The process that writes would see tensors of a CPU change: they are not copied.
        ("--async-save", _OUT),
    ),
    _needs(
        _OFFLOAD,
        _DISTRIBUTED,
        lambda s: s.optimizer_cpu_offload and not s.use_distributed_optimizer,
    ),
    Rule(
        "--optimizer-offload-fraction {at.optimizer_offload_fraction} is not allowed: it must be "
        "from 0 to 1.",
        when=lambda s: (
            s.optimizer_cpu_offload and not 0 <= (s.optimizer_offload_fraction or 0) <= 1
        ),
    ),
    _not_with("--use-precision-aware-optimizer", f"{_OUT}, or use --optimizer adam"),
    # What has not been shown to be exact, or does not work, with Megatron-FSDP.
    _not_with(
        _FSDP, f"{_SHARDING}, or Megatron 0.19", "{given} on Megatron {release}", releases=_OTHER
    ),
    Rule(
        "{given} needs --ckpt-format fsdp_dtensor, also where nothing is saved: add it.",
        _FSDP,
        when=lambda s: s.ckpt_format not in (None, "fsdp_dtensor"),
    ),
    *_beside(
        _FSDP,
        ("--num-distributed-optimizer-instances", "use 1", (1,)),
        ("--pipeline-model-parallel-size", _SHARDING, (1,)),
        ("--num-experts", _SHARDING, (), "num_moe_experts"),
        ("--fp16", "use --bf16"),
        ("--loss-scale", _OUT),
        ("--fp8-format", _OUT, (), "fp8"),
        ("--fp4-format", _OUT, (), "fp4"),
        ("--cuda-graph-impl", "use none", ("none",)),
        ("--init-model-with-meta-device", _OUT),
        ("--use-nccl-ub", _OUT, (), "nccl_ub"),
        ("--qk-clip", _OUT),
        ("--rl-offload-optimizer-during-inference", _OUT),
        ("--came-momentum-dtype", "use fp32", ("fp32",)),
        ("--came-main-params", "use fp32", ("fp32",)),
        ("--non-persistent-ckpt-type", _OUT),
        ("--async-save", _OUT),
    ),
    Rule(
        "--optimizer came does not go with --use-megatron-fsdp and another "
        "--megatron-fsdp-main-params-dtype than fp32: use that.",
        when=conditions.has_other_main_weights,
    ),
    Rule(
        "Megatron cannot save the two projections of {given} with --use-megatron-fsdp at "
        "--data-parallel-sharding-strategy no_shard: use optim, or leave --save and --load out.",
        "--swiglu",
        when=lambda s: (
            s.use_megatron_fsdp
            and s.data_parallel_sharding_strategy == "no_shard"
            and conditions.has_checkpoints(s)
        ),
    ),
    Rule(
        "--optimizer came does not go with {given}, whose replays would go on with the learning "
        "rate and the number of steps at its capture: use --came-cuda-graph.",
        "--optimizer-cuda-graph",
    ),
    Rule(
        "--came-cuda-graph is for Triton's kernels: leave it or {given} out.",
        "--came-kernels",
        works=("auto", "triton"),
        when=lambda s: s.came_cuda_graph,
    ),
    # Weights in fp8, which Megatron quantises from fp32 main weights.
    Rule(
        "--optimizer came does not go with {given}, with whose weights neither its step nor its "
        "checkpoints have been tested: leave it out, and weights are gathered in bf16.",
        "--fp4-param-gather",
    ),
    _needs(
        _FP8,
        "the distributed optimizer, without FSDP: add --use-distributed-optimizer",
        lambda s: (
            s.fp8_param_gather
            and (not s.use_distributed_optimizer or s.use_megatron_fsdp or s.use_torch_fsdp2)
        ),
    ),
    _needs(
        _FP8, "--bf16, for what is not in fp8: add it", lambda s: s.fp8_param_gather and not s.bf16
    ),
    Rule(
        f"{_REMAINDER} completes bf16 weights, and {_FP8} keeps fp8 ones: leave one of them out.",
        when=lambda s: s.fp8_param_gather and _has_remainders(s),
    ),
    Rule(
        f"{{given}} does not go with {_FP8}, whose weights it saves as Transformer Engine's own "
        "objects, which are not read here: use torch_dist.",
        "--ckpt-format",
        works=("torch_dist",),
        when=lambda s: s.fp8_param_gather and conditions.has_checkpoints(s),
    ),
    *_beside(
        _FP8,
        ("--came-report-memory", f"it does not measure such weights, so {_ONE}"),
        ("--qk-clip", f"it writes weights, which has not been tested with such, so {_ONE}"),
    ),
    Rule(
        f"{{given}} does not go with {_REUSED} without --overlap-param-gather, whose weights are "
        "written over the gradients that it looks at: add --overlap-param-gather, or leave one of "
        "them out.",
        "--came-log-diagnostics",
        when=conditions.overwrites_gradients,
    ),
    Rule(
        f"--optimizer came does not go with {_REUSED} and experts on Megatron {{release}}, which "
        "overwrites their gradients before their step: use Megatron 0.18, add "
        f"--overlap-param-gather, or leave {_REUSED} out.",
        when=lambda s: conditions.overwrites_gradients(s) and (s.num_moe_experts or s.num_experts),
        releases=before("0.18"),
    ),
    # Megatron's validation derives these two from the flags.
    _not_with(
        "--tensor-parallel-num-weight-shards",
        f"{_OUT} and use --tensor-model-parallel-size",
        argument="gtp_weight_remat_size",
        works=(1,),
    ),
    _not_with(
        "--expert-tensor-parallel-num-weight-shards",
        f"{_OUT} and use --expert-tensor-parallel-size",
        argument="expert_gtp_weight_remat_size",
        works=(1,),
    ),
    *(
        _not_with(flag, f"{_OUT}: CAME has statistics of its own for each expert")
        for flag in ("--moe-single-grouped-weight", "--moe-single-grouped-bias")
    ),
    _not_with("--use-layer-wise-distributed-optimizer", _SHARDING, "a layer-wise optimizer"),
    _not_with("--use-legacy-models", _OUT),
    # Of which the training loop of 0.19 takes no notice.
    _not_with("--freeze-all-layers", f"{_OUT}, since nothing would be trained"),
    *(
        Rule(
            "{given} is not shorter than the schedule of the learning rate (--lr-decay-iters or "
            "-samples, by default --train-iters or -samples), as Megatron wants it: give less.",
            f"--lr-warmup-{unit}",
            when=conditions.warms_up_to_the_end(unit),
        )
        for unit in ("iters", "samples", "fraction")
    ),
    _not_with(
        "--mtp-num-layers",
        "add --untie-embeddings-and-output-weights, use size 1, or leave --save and --load out",
        "{given}, tied embeddings and checkpoints at --pipeline-model-parallel-size above 1",
        when=conditions.has_tied_mtp_behind_others,
    ),
    _not_with("--yaml-cfg", "give the settings as flags"),
    _needs("--init-model-with-meta-device", "a checkpoint: add --load", conditions.starts_empty),
    *_beside(
        "--ckpt-format torch", ("--async-save", _OUT), (_BETWEEN, _OUT), when=conditions.saves_torch
    ),
    _needs(_BETWEEN, "--non-persistent-ckpt-type global", conditions.saves_nowhere),
    Rule(
        "{given} does not go with --dist-ckpt-optim-fully-reshardable, whose optimizer state "
        "Megatron cannot save locally: leave that out, or use --non-persistent-ckpt-type global.",
        "--non-persistent-ckpt-type",
        works=("global",),
        when=lambda s: s.dist_ckpt_optim_fully_reshardable and s.use_distributed_optimizer,
    ),
    Rule(
        "{given} and --use-checkpoint-opt_param-scheduler ask for the schedule of the flags and of "
        f"the checkpoint: {_ONE}.",
        "--override-opt_param-scheduler",
        when=lambda s: s.use_checkpoint_opt_param_scheduler,
    ),
    Rule(
        "{given} asks Megatron to hand back what a checkpoint lacks, which its training loop does "
        "not take: leave it out.",
        "--dist-ckpt-strictness",
        when=lambda s: s.dist_ckpt_strictness.startswith("return_"),
    ),
    _not_with(  # attention learns offsets, which tensor parallelism cuts without saying so
        "",
        "use another --softmax-type, or size 1",
        "--softmax-type learnable at --tensor-model-parallel-size above 1",
        when=lambda s: s.softmax_type == "learnable" and s.tensor_model_parallel_size > 1,
    ),
    Rule(
        f"{_REMAINDER} completes bf16 weights, and the model's are fp16: add --bf16, or leave "
        f"{_REMAINDER} out.",
        when=lambda s: _has_remainders(s) and not s.bf16 and s.fp16,
    ),
    Rule(
        f"{_REMAINDER} completes bf16 weights, and the model's are fp32: add --bf16, or leave "
        f"{_REMAINDER} out.",
        when=lambda s: _has_remainders(s) and not s.bf16,
    ),
    _needs(
        _REMAINDER, _DISTRIBUTED, lambda s: _has_remainders(s) and not s.use_distributed_optimizer
    ),
    *_beside(  # they ask for main weights in fp32
        _REMAINDER,
        ("--load-main-params-from-ckpt", _ONE),
        ("--log-params-norm", _ONE),
        ("--qk-clip", _ONE),
        when=_has_remainders,
    ),
    Rule(
        "--came-spike-guard {at.came_spike_guard} is not allowed: it must be a finite number above "
        "1.",
        when=lambda s: s.came_spike_guard is not None and not 1.0 < s.came_spike_guard < math.inf,
    ),
    Rule(
        "--came-log-diagnostics writes to TensorBoard and W&B: add --tensorboard-dir or "
        "--wandb-project, or leave it out.",
        "--came-log-diagnostics",
        when=lambda s: not (s.tensorboard_dir or s.wandb_project),
    ),
    Rule(
        "--optimizer came: factored in a --came-rule does not go with FSDP, whose ranks have rows "
        "of a matrix: leave it out.",
        when=lambda s: (
            (s.use_megatron_fsdp or s.use_torch_fsdp2) and "factored=" in str(s.came_rule)
        ),
    ),
    # FSDP2: what Megatron asserts in many words, and what has no place in its checkpoints.
    *_beside(
        _FSDP2,
        ("--pipeline-model-parallel-size", "use 1", (1,)),
        ("--expert-model-parallel-size", "use 1", (1,)),
        ("--use-distributed-optimizer", _ONE),
        ("--fp16", "use --bf16"),
        ("--ckpt-format", "use torch_dist", ("torch_dist",)),  # Megatron resumes from that alone
        ("--non-persistent-ckpt-type", "use global", ("global",)),
        ("--rl-offload-optimizer-during-inference", _OUT),
        ("--came-report-memory", _OUT),
        ("--init-model-with-meta-device", _OUT),
    ),
    Rule(
        f"{_FSDP2} needs weights of their own for embeddings and output: add "
        "--untie-embeddings-and-output-weights.",
        when=lambda s: (
            s.use_torch_fsdp2
            and "untie_embeddings_and_output_weights" in s
            and not s.untie_embeddings_and_output_weights
        ),
    ),
    Rule(
        f"{{given}} is not supported with {_FSDP2} at --tensor-model-parallel-size above 1, where "
        "its random bits would depend on the layout: leave it out, or use size 1.",
        "--came-momentum-dtype",
        works=("fp32",),
        when=lambda s: s.use_torch_fsdp2 and s.tensor_model_parallel_size > 1,
    ),
    # Where it is built.
    Rule(
        f"{_FSDP2} cuts weights at this data-parallel size into unlike numbers of rows, or across "
        "the two projections of SwiGLU, and for that Megatron's checkpoints have no place: use a "
        "size that divides the rows of every weight and with SwiGLU is even, or leave --save and "
        "--load out and --came-momentum-dtype at fp32.",
        when=conditions.fsdp2_saves_unlike_rows,
    ),
    Rule(
        f"{_FSDP2} on Megatron {{release}} saves the two projections of SwiGLU in the wrong order: "
        "leave it out, leave --save and --load out, or use Megatron 0.19.",
        when=lambda s: s.use_torch_fsdp2 and s.gated_linear_unit and conditions.has_checkpoints(s),
        releases=_OLDER,
    ),
    Rule(
        "--optimizer came does not support MiMo models, which build their own optimizers: use "
        "--optimizer adam.",
        when=conditions.is_mimo,
    ),
    Rule(
        "--optimizer came has decoupled weight decay only: leave decoupled_weight_decay on.",
        when=lambda s: "decoupled_weight_decay" in s and not s.decoupled_weight_decay,  # a host's
    ),
    _not_with(
        "--expert-tensor-parallel-size",
        "use --expert-tensor-parallel-size {at.tensor_model_parallel_size}, or Megatron 0.19",
        "{given} at --tensor-model-parallel-size {at.tensor_model_parallel_size} and "
        "--expert-model-parallel-size 1 on Megatron {release}, which reduces the gradients of such "
        "experts over the wrong ranks",
        when=lambda s: (
            s.num_moe_experts
            and s.expert_model_parallel_size == 1
            and s.expert_tensor_parallel_size != s.tensor_model_parallel_size
        ),
        releases=_OLDER,
    ),
    _not_with(
        "",
        "use --transformer-impl transformer_engine without --moe-use-legacy-grouped-gemm, leave "
        "--moe-grouped-gemm out, or Megatron 0.19",
        "--moe-grouped-gemm where Megatron {release} packs all experts of a rank into one weight "
        "(its legacy GroupedMLP)",
        when=conditions.packs_experts,
        releases=_OLDER,
    ),
    _not_with(
        "--expert-tensor-parallel-size",
        "use --expert-tensor-parallel-size 1 with --expert-model-parallel-size above 1, "
        "--transformer-impl local, or Megatron 0.19",
        "{given} and --transformer-impl transformer_engine on Megatron {release}, whose expert "
        "layers do not say how they are cut",
        works=(1,),
        when=conditions.cuts_experts_in_silence,
        releases=_OLDER,
    ),
    Rule(
        "--optimizer came: weights are in fp8, which is supported with --fp8-param-gather alone: "
        "add that, or keep weights in bf16.",
        when=conditions.is_quantized_alone,
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
