"""Checkpoints that CAME cannot resume from are refused, with what to do, before they are loaded."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_came.host.patching import Function, wrap
from megatron_came.host.resumed_settings import say_conversions

# Whether the load under way is to fill an optimizer; a checkpoint's weights alone suit anyone.
_fills_optimizer: ContextVar[bool] = ContextVar("fills_optimizer", default=False)

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_TRACKER = "latest_checkpointed_iteration.txt"
_AFRESH = "give --no-load-optim or --finetune to start it afresh from the checkpoint's weights"


def install() -> None:
    """Check checkpoints between the reading of their arguments and the loading of their state."""
    wrap("megatron.training.checkpointing", "load_checkpoint", _noting_the_optimizer)
    wrap("megatron.training.checkpointing", "_load_base_checkpoint", _with_check)


def _noting_the_optimizer(original: Function) -> Function:
    def load_checkpoint(ddp_model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        token = _fills_optimizer.set(optimizer is not None)
        try:
            return original(ddp_model, optimizer, *args, **kwargs)
        finally:
            _fills_optimizer.reset(token)

    return load_checkpoint


def _with_check(original: Function) -> Function:
    def _load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        try:
            result = original(load_dir, args, *rest, **kwargs)
        except (Exception, CheckpointException) as error:
            if args.optimizer != "came" or not _fills_optimizer.get():
                raise
            raise SystemExit(f"megatron_came: {unreadable(load_dir, error)}") from error
        state = result[0] or {}
        if _fills_optimizer.get() and state.get("args") is not None:
            metadata = state.get("content_metadata") or {}
            legacy = getattr(result[-1], "name", None) == "LEGACY"
            sharding = "legacy" if legacy else metadata.get("distrib_optim_sharding_type")
            problem = refusal(state["args"], args, sharding)
            if problem:
                raise SystemExit(f"megatron_came: {problem}")
            if args.optimizer == "came" and not (args.finetune or args.no_load_optim):
                say_conversions(state["args"], args)
        return result

    return _load_base_checkpoint


def unreadable(load_dir: Any, error: BaseException) -> str:
    """Say in one sentence that a checkpoint cannot be read, and what to do."""
    if isinstance(error, CheckpointException):  # of several ranks: one of theirs
        error = next(iter(error.failures.values()))[0]
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"the checkpoint in {load_dir} cannot be read ({type(error).__name__}: {reason}); if it is "
        "truncated or not Megatron's, resume from an earlier one with --ckpt-step ITERATION, or "
        f"{_AFRESH}."
    )


def refusal(saved: Any, args: Any, sharding_type: str | None) -> str | None:
    """Say in one sentence why the optimizer state of a checkpoint cannot be resumed from, or None.

    Args:
        saved: Megatron's arguments of the run that saved it.
        args: Megatron's arguments of this run.
        sharding_type: format of the distributed optimizer's state in it; "legacy" for the
            ``torch`` format, None if not known.
    """
    if args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False):
        return None
    before, now = getattr(saved, "optimizer", None), args.optimizer
    if before != now and "came" in (before, now):
        return (
            f"the checkpoint holds the state of --optimizer {before}, this run has --optimizer "
            f"{now}: {_AFRESH}."
        )
    if now != "came":
        return None
    sharded = bool(getattr(saved, "use_distributed_optimizer", False))
    if sharded != bool(args.use_distributed_optimizer):
        verb = "add" if sharded else "leave out"
        return (
            f"the checkpoint was saved {'with' if sharded else 'without'} "
            f"--use-distributed-optimizer, whose state Megatron stores in a way of its own: {verb} "
            f"it, or {_AFRESH}."
        )
    if _experts_apart(saved) != _experts_apart(args):
        return (
            "Megatron keeps the optimizer state of experts apart where "
            "--expert-model-parallel-size is above 1 or --expert-tensor-parallel-size differs from "
            "the dense one, and the checkpoint and this run differ in that: resume at the saved "
            f"sizes, or {_AFRESH}."
        )
    if not sharded or sharding_type not in ("dp_reshardable", "legacy"):
        return None
    step = getattr(args, "ckpt_step", None)
    if sharding_type == "legacy" and step and _latest(args.load) != str(step):
        return (
            f"--ckpt-step {step} is not the latest checkpoint, of which Megatron would take the "
            "optimizer's state all the same, because this one has --ckpt-format torch: write "
            f"{step} to {_TRACKER} in {args.load} and leave --ckpt-step out, or {_AFRESH}."
        )
    for name in _SIZES:
        was, size = getattr(saved, name, None) or 1, getattr(args, name, None) or 1
        if was != size:
            flag = "--" + name.replace("_", "-")
            return (
                f"the checkpoint was saved at {flag} {was}, this run has {size}, and its format of "
                "optimizer state allows a change of the data-parallel size alone: resume at "
                f"{was}, save there with --ckpt-format torch_dist "
                f"--dist-ckpt-optim-fully-reshardable and resume from that, or {_AFRESH}."
            )
    before, now = (bool(getattr(each, "grad_reduce_in_bf16", False)) for each in (saved, args))
    if before != now:
        return (
            f"the checkpoint was saved {'with' if before else 'without'} --grad-reduce-in-bf16, "
            "and its format of optimizer state does not allow a change of that: "
            f"{'add' if before else 'leave out'} it, save so with --ckpt-format torch_dist "
            f"--dist-ckpt-optim-fully-reshardable and resume from that, or {_AFRESH}."
        )
    return None


def _latest(folder: Any) -> str | None:
    """What Megatron's tracker file names as the latest checkpoint of a folder."""
    tracker = Path(str(folder)) / _TRACKER
    return tracker.read_text().strip() if tracker.is_file() else None


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
