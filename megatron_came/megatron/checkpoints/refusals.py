"""Optimizer state that a run cannot resume from, as the two runs' flags tell."""

from collections.abc import Iterator
from typing import Any

from megatron_came.checkpoint_files.folder import TRACKER
from megatron_came.megatron.checkpoints.contents import AFRESH
from megatron_came.megatron.checkpoints.folders import tracked
from megatron_came.rules import Settings, flag_of

_RESHARDABLE = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"
# Sizes that formats of the optimizer's state by buckets are bound to.
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# Megatron's buckets have 1,000,000 elements for each data-parallel rank, and for 40 at least.
_RANKS_OF_LEAST, _ELEMENTS_OF_RANK = 40, 1_000_000


def refusal(saved: Any, args: Any, sharding_type: str | None) -> str | None:
    """Say in one sentence why the optimizer state of a checkpoint cannot be resumed from, or None.

    ``sharding_type`` is the format of the distributed optimizer's state in it: "legacy" for the
    ``torch`` format, None if not known.
    """
    if args.finetune or args.no_load_optim:
        return None
    before, run = Settings(saved), Settings(args)
    if run.optimizer == "came":
        return next(_refusals(before, run, sharding_type), None)
    if before.optimizer == "came" and not before.no_save_optim:
        return _of_another(before.optimizer, run.optimizer)
    return None


def _of_another(before: Any, now: Any) -> str:
    return (
        f"the checkpoint holds the state of --optimizer {before}, this run has --optimizer {now}: "
        f"{AFRESH}."
    )


def _refusals(saved: Settings, args: Settings, sharding_type: str | None) -> Iterator[str]:
    if saved.no_save_optim:
        yield f"the checkpoint was saved with --no-save-optim and holds no optimizer: {AFRESH}."
    if saved.optimizer != "came":
        yield _of_another(saved.optimizer, "came")
    sharded = bool(saved.use_distributed_optimizer)
    if sharded != bool(args.use_distributed_optimizer):
        verb = "add it" if sharded else "leave it out"
        yield (
            f"the checkpoint was saved {'with' if sharded else 'without'} "
            "--use-distributed-optimizer, whose state Megatron stores in a way of its own: "
            f"{verb}, or {AFRESH}."
        )
    if _experts_apart(saved) != _experts_apart(args):
        yield (
            "Megatron keeps the optimizer state of experts apart where "
            "--expert-model-parallel-size is above 1 or --expert-tensor-parallel-size differs from "
            "the dense one, and the checkpoint and this run differ in that: resume at the saved "
            f"sizes, or {AFRESH}."
        )
    before, now = _precision(saved), _precision(args)
    # Models in bf16 and fp16 have the same main weights, in fp32.
    matters = args.use_distributed_optimizer or "fp32" in (before, now)
    by_name = ("fully_reshardable", "fsdp_dtensor")  # and main weights in fp32, whatever the model
    if sharding_type not in by_name and before != now and matters:
        yield (
            f"the checkpoint's run had {before} weights, this run has {now} ones, and the "
            "checkpoint's format of optimizer state does not allow a change of that: give the "
            "flags of its run, save so with --ckpt-format torch_dist --use-distributed-optimizer "
            f"--dist-ckpt-optim-fully-reshardable and resume from that, or {AFRESH}."
        )
    before, now = (run.tensor_model_parallel_size for run in (saved, args))
    if sharding_type == "fsdp_dtensor" and saved.quick_geglu and before != now:
        yield (
            f"the checkpoint was saved at --tensor-model-parallel-size {before} with "
            "--quick-geglu, whose two projections Megatron does not take apart with "
            f"--use-megatron-fsdp: resume at {before}."
        )
    if sharded and sharding_type in ("dp_reshardable", "legacy"):
        yield from _refusals_by_buckets(saved, args, sharding_type)


def _refusals_by_buckets(saved: Settings, args: Settings, sharding_type: str) -> Iterator[str]:
    """Say what formats that store the optimizer's state by buckets do not allow."""
    step = args.ckpt_step
    # Megatron names the file with the optimizer's state by the tracker alone.
    if sharding_type == "legacy" and step and tracked(args.load) != str(step):
        yield (
            f"--ckpt-step {step} is not the latest checkpoint, of which Megatron would take the "
            "optimizer's state all the same, because this one has --ckpt-format torch: write "
            f"{step} to {TRACKER} in {args.load} and leave --ckpt-step out, or {AFRESH}."
        )
    target = args.override_ckpt_iteration
    if sharding_type == "legacy" and target is not None:
        yield (
            f"--override-ckpt-iteration {target} goes for the data alone with --ckpt-format torch "
            "and --use-distributed-optimizer, where Megatron takes the iteration from "
            f"{TRACKER}: leave it out, save with --ckpt-format torch_dist and resume from that, "
            f"or {AFRESH}."
        )
    for name in _SIZES:
        was, size = getattr(saved, name) or 1, getattr(args, name) or 1
        if was != size:
            yield (
                f"the checkpoint was saved at {flag_of(name)} {was}, this run has {size}, and its "
                "format of optimizer state allows a change of the data-parallel size alone: resume "
                f"at {was}, save there with {_RESHARDABLE} and resume from that, or {AFRESH}."
            )
    before, now = (bool(each.grad_reduce_in_bf16) for each in (saved, args))
    if before != now:
        yield (
            f"the checkpoint was saved {'with' if before else 'without'} --grad-reduce-in-bf16, "
            "and its format of optimizer state does not allow a change of that: "
            f"{'add it' if before else 'leave it out'}, save so with {_RESHARDABLE} and resume "
            f"from that, or {AFRESH}."
        )


def bucket_refusal(load_dir: Any, saved: Any, args: Any) -> str | None:
    """Say in one sentence that a checkpoint was cut into other buckets, if its flags tell."""
    changes = bucket_changes(saved, args)
    if not changes:
        return None
    return (
        f"the checkpoint in {load_dir} was cut into other buckets ({changes}), which its format "
        f"of optimizer state does not allow: resume with those, save there with {_RESHARDABLE} "
        "and resume from that, or give --no-load-optim or --finetune."
    )


def bucket_changes(saved: Any, args: Any) -> str:
    """Say which flags that decide on buckets the run that saved had otherwise; empty if none."""
    saved, args = Settings(saved), Settings(args)
    found = []
    before, now = (bool(each.overlap_grad_reduce) for each in (saved, args))
    if before != now:
        found.append(f"{'with' if before else 'without'} --overlap-grad-reduce")
    for name in ("ddp_bucket_size", "ddp_num_buckets"):
        was, size = getattr(saved, name), getattr(args, name)
        if was != size:
            found.append(
                f"without {flag_of(name)}" if was is None else f"with {flag_of(name)} {was}"
            )
    # The size of buckets grows with the number of ranks unless one is given.
    was, size = (each.data_parallel_size or 1 for each in (saved, args))
    if before and now and was != size and max(was, size) > _RANKS_OF_LEAST and not found:
        elements = max(_RANKS_OF_LEAST, was) * _ELEMENTS_OF_RANK
        found.append(
            f"at data-parallel size {was}, where --ddp-bucket-size is {elements} unless it is given"
        )
    return ", ".join(found)


def _precision(args: Settings) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(args, name)), "fp32")


def _experts_apart(args: Settings) -> bool:
    """Whether expert parameters have an optimizer of their own."""
    dense = args.tensor_model_parallel_size or 1
    cut = (args.expert_model_parallel_size or 1) > 1
    cut |= (args.expert_tensor_parallel_size or dense) != dense
    return bool(args.num_experts) and cut


def notice(args: Any) -> str | None:
    """Say in one sentence how far the checkpoints of this run can be resharded, if not at will."""
    saves = args.save is not None and not args.no_save_optim and args.ckpt_format == "torch_dist"
    if not saves or not args.use_distributed_optimizer or args.dist_ckpt_optim_fully_reshardable:
        return None
    return (
        "checkpoints of this run can be resumed at another data-parallel size, but not at other "
        "tensor- or pipeline-parallel sizes; --dist-ckpt-optim-fully-reshardable allows these."
    )
