"""Checkpoints that CAME cannot resume from are refused, with what to do, before they are loaded."""

from __future__ import annotations

from typing import Any

from megatron_came.megatron.checkpoints.contents import AFRESH
from megatron_came.megatron.checkpoints.folders import TRACKER, tracked

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def refusal(saved: Any, args: Any, sharding_type: str | None) -> str | None:
    """Say in one sentence why the optimizer state of a checkpoint cannot be resumed from, or None.

    Args:
        saved: Megatron's arguments of the run that saved it.
        args: Megatron's arguments of this run.
        sharding_type: format of the distributed optimizer's state in it; "legacy" for the
            ``torch`` format, None if not known.
    """
    if args.finetune or args.no_load_optim:
        return None
    before, now = getattr(saved, "optimizer", None), args.optimizer
    if getattr(saved, "no_save_optim", False):
        if now != "came":
            return None
        return f"the checkpoint was saved with --no-save-optim and holds no optimizer: {AFRESH}."
    if before != now and "came" in (before, now):
        return (
            f"the checkpoint holds the state of --optimizer {before}, this run has --optimizer "
            f"{now}: {AFRESH}."
        )
    if now != "came":
        return None
    sharded = bool(getattr(saved, "use_distributed_optimizer", False))
    if sharded != bool(args.use_distributed_optimizer):
        verb = "add" if sharded else "leave out"
        return (
            f"the checkpoint was saved {'with' if sharded else 'without'} "
            f"--use-distributed-optimizer, whose state Megatron stores in a way of its own: {verb} "
            f"it, or {AFRESH}."
        )
    if _experts_apart(saved) != _experts_apart(args):
        return (
            "Megatron keeps the optimizer state of experts apart where "
            "--expert-model-parallel-size is above 1 or --expert-tensor-parallel-size differs from "
            "the dense one, and the checkpoint and this run differ in that: resume at the saved "
            f"sizes, or {AFRESH}."
        )
    if sharding_type != "fully_reshardable" and (problem := _precision_problem(saved, args)):
        return problem
    if not sharded or sharding_type not in ("dp_reshardable", "legacy"):
        return None
    step = getattr(args, "ckpt_step", None)
    if sharding_type == "legacy" and step and tracked(args.load) != str(step):
        return (
            f"--ckpt-step {step} is not the latest checkpoint, of which Megatron would take the "
            "optimizer's state all the same, because this one has --ckpt-format torch: write "
            f"{step} to {TRACKER} in {args.load} and leave --ckpt-step out, or {AFRESH}."
        )
    for name in _SIZES:
        was, size = getattr(saved, name, None) or 1, getattr(args, name, None) or 1
        if was != size:
            flag = "--" + name.replace("_", "-")
            return (
                f"the checkpoint was saved at {flag} {was}, this run has {size}, and its format of "
                "optimizer state allows a change of the data-parallel size alone: resume at "
                f"{was}, save there with --ckpt-format torch_dist "
                f"--dist-ckpt-optim-fully-reshardable and resume from that, or {AFRESH}."
            )
    before, now = (bool(getattr(each, "grad_reduce_in_bf16", False)) for each in (saved, args))
    if before != now:
        return (
            f"the checkpoint was saved {'with' if before else 'without'} --grad-reduce-in-bf16, "
            "and its format of optimizer state does not allow a change of that: "
            f"{'add' if before else 'leave out'} it, save so with --ckpt-format torch_dist "
            f"--dist-ckpt-optim-fully-reshardable and resume from that, or {AFRESH}."
        )
    return None


def _precision_problem(saved: Any, args: Any) -> str | None:
    """Say in one sentence that weights of another precision were saved, where that matters."""
    before, now = _precision(saved), _precision(args)
    if before == now or (not args.use_distributed_optimizer and "fp32" not in (before, now)):
        return None
    return (
        f"the checkpoint's run had {before} weights, this run has {now} ones, and the checkpoint's "
        "format of optimizer state does not allow a change of that: give the flags of its run, "
        "save so with --ckpt-format torch_dist --use-distributed-optimizer "
        f"--dist-ckpt-optim-fully-reshardable and resume from that, or {AFRESH}."
    )


def _precision(args: Any) -> str:
    return next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "fp32")


def _experts_apart(args: Any) -> bool:
    """Whether expert parameters have an optimizer of their own."""
    if not getattr(args, "num_experts", None):
        return False
    dense = getattr(args, "tensor_model_parallel_size", 1)
    return (getattr(args, "expert_model_parallel_size", 1) or 1) > 1 or (
        (getattr(args, "expert_tensor_parallel_size", None) or dense) != dense
    )


def notice(args: Any) -> str | None:
    """Say in one sentence how far the checkpoints of this run can be resharded, if not at will."""
    saves = args.save is not None and not args.no_save_optim and args.ckpt_format == "torch_dist"
    if not saves or not args.use_distributed_optimizer or args.dist_ckpt_optim_fully_reshardable:
        return None
    return (
        "checkpoints of this run can be resumed at another data-parallel size, but not at other "
        "tensor- or pipeline-parallel sizes; --dist-ckpt-optim-fully-reshardable allows these."
    )
