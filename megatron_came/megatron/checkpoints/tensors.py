"""Tensors that a checkpoint has and a run lacks, or the other way, or that have other shapes in it.

Megatron leaves what the model does not ask for unsaid, fills rows of a larger vocabulary with zeros
and drops those of a smaller one; a ``torch`` checkpoint that does not fit is loaded as far as it
does. Of ``fsdp_dtensor`` it names what lacks in many lines, or takes what there is.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_came.checkpoint_files.errors import CheckpointError
from megatron_came.checkpoint_files.torch_dist import MODEL
from megatron_came.core.state import FACTORS
from megatron_came.megatron.checkpoints import folders
from megatron_came.megatron.checkpoints.under_way import Load, current
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import boxes_in, sharded_entries
from megatron_came.patching import Function
from megatron_came.voice import collectives_device, end_if, of_all_ranks, say_once, some, stop

_OPTIMIZER, _STATE = "optimizer.", "optimizer.state."
_LEFT = "the checkpoint holds {}, which the model lacks: left out."
_NEW = "the model has {}, which the checkpoint lacks: new."
Shapes = Mapping[str, tuple[int, ...]]


class Asked(NamedTuple):
    """What a rank asks a checkpoint for."""

    shapes: Shapes  # of whole tensors, by name
    vocabulary: set[str]  # names of those that Megatron lets differ in their number of rows


def asked_for(sharded_state: Mapping[str, Any]) -> Asked:
    """List what a sharded state dictionary asks a distributed checkpoint for."""
    leaves = [
        leaf
        for entry in sharded_entries(sharded_state)
        for leaf in boxes_in(entry)
        if isinstance(leaf, ShardedTensor)
    ]
    return Asked(
        {leaf.key: tuple(leaf.global_shape) for leaf in leaves},
        {leaf.key for leaf in leaves if leaf.allow_shape_mismatch},
    )


def misfit(asked: Asked, saved: Shapes, differing: str = "") -> str | None:
    """Say in one sentence which tensor that a model asks for is not as it needs it, or None.

    ``differing`` is what differs between the flags of the two runs, in brackets.
    """
    afresh = f"of its run{differing}, or --no-load-optim to start CAME afresh from its weights."
    missing = [key for key in asked.shapes if key not in saved]
    if weights := _weights(missing):
        return (
            f"the model has {some(weights)}, which the checkpoint lacks: give it the flags of "
            f"the checkpoint's run{differing}."
        )
    if missing:
        return (
            f"the checkpoint lacks {some(missing)} of the optimizer's state: give the flags "
            f"{afresh}"
        )
    others = [
        key
        for key, shape in asked.shapes.items()
        if shape != saved[key] and key not in asked.vocabulary
    ]
    if others and not _weights(others):
        return (
            "the optimizer's state in the checkpoint belongs to other parameters than this run's, "
            f"and its format does not allow that: give the flags {afresh}"
        )
    if others:
        return (
            f"{others[0]} is {_size(asked.shapes[others[0]])} in this run and "
            f"{_size(saved[others[0]])} in the checkpoint: give the flags of its run{differing}."
        )
    return None


def of_legacy(
    load: Load, state: Mapping[str, Any], *, resumes: bool
) -> tuple[str | None, list[str]]:
    """Compare a rank's model with its file of a ``torch`` checkpoint.

    Returns:
        Why they do not fit, in a sentence, or None; and sentences on what is taken otherwise.
    """
    mine: dict[str, tuple[int, ...]] = {}
    its: dict[str, tuple[int, ...]] = {}
    for index, chunk in enumerate(load.model_chunks):
        is_one = len(load.model_chunks) == 1
        key, prefix = ("model", "") if is_one else (f"model{index}", f"chunk {index}: ")
        mine |= flat(chunk.state_dict_for_save_checkpoint(), prefix)
        its |= flat(state.get(key), prefix)
    left = [name for name in its if name not in mine]
    if resumes:
        problem = misfit(Asked(mine, set()), its, load.differing)
        return problem or _leftover_refusal(left, load.differing), []
    new = [name for name in mine if name not in its]
    return None, _said(left, _LEFT) + _said(new, _NEW)


def left_over(asked: Asked, saved: Shapes) -> tuple[list[str], list[str]]:
    """Name what no rank asks a checkpoint for; a collective.

    Returns:
        What the run would lose, and the optimizer's state of parameters that it does not train.
    """
    names = sorted(saved)
    taken = torch.tensor([name in asked.shapes for name in names], dtype=torch.int32)
    if dist.is_initialized():
        taken = taken.to(collectives_device())
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    is_taken = dict(zip(names, map(bool, taken.tolist()), strict=True))
    left = [name for name, value in is_taken.items() if not value]
    if len(_weights(asked.shapes)) == len(asked.shapes):  # no state of the optimizer is loaded
        return _weights(left), []
    trained = {_parameter(name) for name, value in is_taken.items() if value}
    untrained = {
        name
        for name in left
        if _parameter(name) not in trained and is_taken.get(_parameter(name) or "")
    }
    return [name for name in left if name not in untrained], sorted(untrained)


def _parameter(name: str) -> str | None:
    """The parameter that a tensor of the optimizer's state belongs to; None for any other."""
    return name.split(".", 3)[3] if name.startswith(_STATE) else None  # behind optimizer.state.KEY.


def _leftover_refusal(names: list[str], differing: str) -> str | None:
    if weights := _weights(names):
        return (
            f"the checkpoint holds {some(weights)}, which the model lacks: give it the flags of "
            f"the checkpoint's run{differing}, or --no-load-optim or --finetune to train it on "
            "from those weights that fit."
        )
    if not names:
        return None
    return (
        f"the checkpoint holds {some(names)}, which this run would leave behind: give the flags "
        f"of its run{differing}, or --no-load-optim to start CAME afresh from its weights."
    )


def _said(names: list[str], sentence: str) -> list[str]:
    return [sentence.format(some(names))] if names else []


def _rows(asked: Asked, saved: Shapes) -> tuple[int, int] | None:
    """The rows of the vocabulary in the checkpoint and in this run, if they differ."""
    pairs = (
        pair
        for key in asked.vocabulary
        for pair in zip(saved.get(key, ()), asked.shapes[key], strict=False)
    )
    return next(((before, now) for before, now in pairs if before != now), None)


def _vocabulary(before: int, now: int, tokens: int | None) -> tuple[str, bool]:
    """Say what becomes of a vocabulary of another size, and whether that is to be refused."""
    what = (
        f"the vocabulary is padded to {now} rows in this run and to {before} in the checkpoint "
        "(--vocab-size, --make-vocab-size-divisible-by, --tensor-model-parallel-size or another "
        "tokenizer)"
    )
    if now > before:
        return (
            f"{what}: the {now - before} new rows start at zero, so that the model takes their "
            "tokens for likely and the loss begins higher."
        ), False
    if tokens is None or tokens <= now:
        return f"{what}: its last {before - now} rows are left out.", False
    return (
        f"{what}, and its {tokens} tokens would lose rows: give the flags of its run, or start a "
        "new one."
    ), True


def flat(state: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a state dictionary, by name; of damaged ones, what there is."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Mapping):
            shapes |= flat(value, f"{prefix}{key}.")
        # An _extra_state is Transformer Engine's, and of any size.
        elif isinstance(value, torch.Tensor) and not str(key).endswith("_extra_state"):
            shapes[f"{prefix}{key}"] = tuple(value.shape)
    return shapes


def _weights(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith(_OPTIMIZER)]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def saved_shapes(path: str, group: dist.ProcessGroup | None = None) -> Shapes:
    """Which tensors a distributed checkpoint holds, as the first rank reads it; a collective.

    Raises:
        CheckpointError: on all ranks, if it cannot be read.
    """
    found: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        try:
            found[0] = folders.shapes_in(path)
        except (CheckpointError, OSError) as error:  # all ranks are to hear of it
            found[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(found, group=group, group_src=0)
    if found[1]:
        raise CheckpointError(found[1])
    shapes: Shapes = found[0]
    return shapes


def stop_if_misfit(
    load: Load, asked: Asked, path: str, *, resumes: bool, trained: bool = False
) -> list[str]:
    """Stop on all ranks where a distributed checkpoint's tensors do not fit; a collective.

    With ``resumes`` everything is to be taken; ``trained`` compares those of weights and of the
    optimizer's state alone.

    Returns:
        Sentences on what is taken otherwise.
    """
    try:
        saved = saved_shapes(path)
    except CheckpointError as error:
        stop(str(error))
    saved = _trained(saved) if trained else saved
    left, untrained = left_over(asked, saved)
    missing = [name for name in asked.shapes if name not in saved]  # as some --dist-ckpt-strictness
    notices = [] if resumes else _said(missing, _NEW)
    there = {name: shape for name, shape in asked.shapes.items() if resumes or name in saved}
    problem = misfit(asked._replace(shapes=there), saved, load.differing)
    problem = problem or (_leftover_refusal(left, load.differing) if resumes else None)
    if not asked.shapes:
        problem = (
            "the checkpoint is of --ckpt-format torch_dist, and this run, of another, asks it for "
            "nothing: give --ckpt-format torch_dist."
        )
    if rows := _rows(asked, saved):
        sentence, is_refused = _vocabulary(*rows, getattr(load.saved, "vocab_size", None))
        problem = problem or (sentence if is_refused else None)
        notices.append(sentence)
    if untrained:
        notices.append(
            f"this run does not train all parameters of the checkpoint's: {some(untrained)} "
            "is not taken."
        )
    end_if(problem)
    return notices + _said([] if resumes else left, _LEFT)


def with_shapes(
    original: Function, sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any
) -> Any:
    """Refuse a checkpoint without what CAME asks for, where Megatron's training loop is not."""
    if current.get() is None:
        asked = asked_for(sharded_state_dict)
        # Megatron alone would leave out what is missing, or end one rank.
        if any(f".{key}." in name for name in asked.shapes for key in FACTORS):
            group = kwargs.get("process_group")
            lacking = misfit(asked, saved_shapes(str(checkpoint_dir), group))
            problem = next(filter(None, of_all_ranks(lacking, group)), None)
            if problem:
                raise UnsupportedError(f"{checkpoint_dir}: {problem}")
    return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)


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
    asked = Asked(_trained(flat(state)), set())
    resumes = "optimizer" in state
    for notice in stop_if_misfit(load, asked, folder, resumes=resumes, trained=True):
        say_once(notice)
    return state


def _trained(shapes: Shapes) -> Shapes:
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
