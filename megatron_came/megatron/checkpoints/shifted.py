"""A warning of Megatron's fully reshardable checkpoints, which releases before 0.20 save shifted.

CAME's are saved rightly (:func:`.buckets.offsets_as_gathered`); those of the other
optimizers are Megatron's, which is not changed.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_came.megatron.checkpoints.buckets import mended
from megatron_came.megatron.checkpoints.contents import sharding_of
from megatron_came.megatron.run import run_args
from megatron_came.patching import Function
from megatron_came.versions import check_version
from megatron_came.voice import of_all_ranks, say

# Folders of checkpoints that were read, and may be shifted.
_suspects: list[str] = []


def with_warning(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Look, when model and optimizer stand, whether this run's checkpoints get shifted."""
    _suspects.clear()  # those of a run before, in the same process
    result = original(*args, **kwargs)
    settings = run_args()
    shifts = writes(settings) and not mended() and padded_anywhere(result[0])
    warning = _warning(settings, shifts)
    if warning:
        say(warning)
    return result


def note(load_dir: Any, state: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Remember a checkpoint of another optimizer that was read and may be shifted."""
    if sharding_of(state) != "fully_reshardable" or args.finetune or args.no_load_optim:
        return
    saved = state.get("args")
    tied = not getattr(saved, "untie_embeddings_and_output_weights", False)
    stages = getattr(saved, "pipeline_model_parallel_size", 1) > 1
    # Tied embeddings of several stages have a bucket of their own.
    has_buckets = getattr(saved, "overlap_grad_reduce", False) or (stages and tied)
    if has_buckets and not getattr(saved, "no_save_optim", False):
        _suspects.append(str(load_dir))


def writes(args: argparse.Namespace) -> bool:
    """Whether a run saves another optimizer's state in the format that may get shifted."""
    return bool(
        args.optimizer != "came"
        and args.save is not None
        and not args.no_save_optim
        and args.ckpt_format == "torch_dist"
        and args.dist_ckpt_optim_fully_reshardable
        and (
            args.use_distributed_optimizer
            or getattr(args, "use_layer_wise_distributed_optimizer", False)
        )
    )


def padded_anywhere(model_chunks: Sequence[Any]) -> bool:
    """Whether a buffer of any rank has padding before its last bucket. All ranks must ask."""
    from megatron.core.distributed import DistributedDataParallel

    found = any(
        bucket.grad_data.numel() != bucket.numel_unpadded
        for chunk in model_chunks
        if isinstance(chunk, DistributedDataParallel)
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        for bucket in buffer.buckets[:-1]
    )
    return any(of_all_ranks(found))


def _warning(args: argparse.Namespace, shifts: bool) -> str | None:
    optimizer, fault = f"--optimizer {args.optimizer}", "NVIDIA/Megatron-LM#5077"
    if shifts:
        return (
            f"WARNING: with {optimizer} and --dist-ckpt-optim-fully-reshardable Megatron "
            f"{check_version()} saves main weights and optimizer state of this run shifted, "
            f"because there is padding between the buckets of its buffers ({fault}): leave "
            "--dist-ckpt-optim-fully-reshardable out, and do not resume from what was saved with "
            "it, but from its weights with --no-load-optim."
        )
    if _suspects:
        return (
            f"WARNING: the optimizer state in {_suspects[0]} may be shifted: a Megatron before "
            f"0.20 saves fully reshardable checkpoints so where a run has padding between the "
            f"buckets of its buffers ({fault}); if in doubt, give --no-load-optim to go on from "
            "its weights."
        )
    return None
