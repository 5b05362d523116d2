"""Names and shapes of what is asked of a checkpoint beside what it has, where nobody else looks.

Megatron's training loop compares those of ``torch_dist``; of ``fsdp_dtensor`` it names what lacks
in many lines, or takes what there is, as is asked for.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.torch_dist import MODEL
from megatron_came.core.state import FACTORS
from megatron_came.megatron.checkpoints import folders, tensors
from megatron_came.megatron.checkpoints.under_way import Load, current
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.patching import Function, around
from megatron_came.voice import end_if, of_all_ranks, say_once, stop


def saved_shapes(path: str, group: dist.ProcessGroup | None = None) -> tensors.Shapes:
    """Which tensors a distributed checkpoint holds, as the first rank reads it; a collective.

    Raises:
        CheckpointError: on all ranks, if it cannot be read.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    found: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        try:
            found[0] = folders.shapes_in(folder)
        except (CheckpointError, OSError) as error:  # all ranks are to hear of it
            found[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(found, group=group, group_src=0)
    if found[1]:
        raise CheckpointError(found[1])
    shapes: tensors.Shapes = found[0]
    return shapes


def stop_if_misfit(
    load: Load, asked: tensors.Asked, path: str, *, resumes: bool, trained: bool = False
) -> list[str]:
    """Stop on all ranks where a distributed checkpoint's tensors do not fit; a collective.

    ``trained`` compares those of weights and of the optimizer's state alone.

    Returns:
        Sentences on what is taken otherwise.
    """
    try:
        found = saved_shapes(path)
    except CheckpointError as error:
        stop(str(error))
    saved = _trained(found) if trained else found
    problem, notices = tensors.of_distributed(load, asked, saved, resumes=resumes)
    end_if(problem)
    return notices


@around
def with_shapes(
    original: Function, sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any
) -> Any:
    """Refuse a checkpoint without what CAME asks for, where Megatron's training loop is not."""
    if current.get() is None:
        asked = tensors.asked_for(sharded_state_dict)
        if any(f".{key}." in name for name in asked.shapes for key in FACTORS):
            group = kwargs.get("process_group")
            misfit = tensors.misfit(asked, saved_shapes(str(checkpoint_dir), group))
            problem = next(filter(None, of_all_ranks(misfit, group)), None)
            if problem:
                raise UnsupportedError(f"{checkpoint_dir}: {problem}")
    return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)


@around
def with_names(original: Function, args: Any, raw_state_dict: Any, model: Any) -> Any:
    """Compare what a run with Megatron-FSDP asks of a checkpoint with what it has."""
    if args.optimizer == "came" and not (args.bf16 or args.fp16):
        # Megatron looks for SwiGLU's weights in a wrapper that fp32 models do not have.
        model = torch.nn.ModuleDict({"module": model})
    state = original(args, raw_state_dict, model)
    load = current.get()
    if load is None or args.optimizer != "came":
        return state
    _drop_random_states(state, load.saved, args)
    folder = folders.name_of(load.folder, args, return_base_dir=True)
    asked = tensors.Asked(_trained(tensors.flat(state)), set())
    resumes = "optimizer" in state
    for notice in stop_if_misfit(load, asked, folder, resumes=resumes, trained=True):
        say_once(notice)
    return state


def _trained(shapes: tensors.Shapes) -> tensors.Shapes:
    """Those of weights and of the optimizer's state: others are random states."""
    return {
        name.removeprefix(MODEL): shape
        for name, shape in shapes.items()
        if name.startswith((MODEL, "optimizer."))
    }


def _drop_random_states(state: dict[str, Any], saved: Any, args: Any) -> None:
    """Leave random states as they are where Megatron does so in ``torch_dist``, too."""
    before, now = saved.tensor_model_parallel_size, args.tensor_model_parallel_size
    why = (
        "it was saved with --no-save-rng"
        if saved.no_save_rng
        else f"it was saved at --tensor-model-parallel-size {before}"
    )
    if "rng_state" in state and (saved.no_save_rng or before != now):
        del state["rng_state"]
        say_once(f"random states are not the checkpoint's, but those of a new run: {why}.")
