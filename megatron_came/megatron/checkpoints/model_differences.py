"""Tensors that a checkpoint has and the model lacks, or that have other shapes in it.

Megatron leaves what the model does not ask for unsaid, fills rows of a larger vocabulary with zeros
and drops those of a smaller one; a ``torch`` checkpoint that does not fit is loaded as far as it
does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_came.checkpoint_files.torch_dist import read_layout

_OPTIMIZER = "optimizer."
Shapes = dict[str, tuple[int, ...]]


class Asked(NamedTuple):
    """What a rank asks a checkpoint for.

    Attributes:
        shapes: of whole tensors, by name.
        vocabulary: names of those that Megatron lets differ in their number of rows.
    """

    shapes: Shapes
    vocabulary: set[str]


def asked_for(sharded_state: Mapping[str, Any]) -> Asked:
    """List what a sharded state dictionary asks a distributed checkpoint for."""
    shapes: Shapes = {}
    vocabulary = set()
    for entry in nested_values(extract_sharded_tensors_and_factories(dict(sharded_state))[0]):
        leaves = [entry] if isinstance(entry, ShardedTensor) else nested_values(entry.build())
        for leaf in leaves:
            if isinstance(leaf, ShardedTensor):
                shapes[leaf.key] = tuple(leaf.global_shape)
                if leaf.allow_shape_mismatch:
                    vocabulary.add(leaf.key)
    return Asked(shapes, vocabulary)


def saved_shapes(folder: str) -> Shapes:
    """Read which tensors a distributed checkpoint holds.

    Raises:
        CheckpointError: its metadata cannot be read.
    """
    return {key: tensor.shape for key, tensor in read_layout(Path(folder)).tensors.items()}


def misfit(asked: Asked, saved: Shapes, differing: str = "") -> str | None:
    """Say in one sentence which tensor a model does not find as it needs it, or None.

    Args:
        asked: for what.
        saved: what there is.
        differing: what differs between the flags of the two runs, in brackets.
    """
    missing = [key for key in asked.shapes if key not in saved]
    if missing:
        weights = [key for key in missing if not key.startswith(_OPTIMIZER)]
        if not weights:
            return (
                f"the checkpoint lacks {_named(missing)} of the optimizer's state: give the flags "
                f"of its run{differing}, or --no-load-optim to start CAME afresh from its weights."
            )
        return (
            f"the model has {_named(weights)}, which the checkpoint lacks: give it the flags of "
            f"the checkpoint's run{differing}."
        )
    others = [
        key
        for key, shape in asked.shapes.items()
        if shape != saved[key] and key not in asked.vocabulary
    ]
    if others and all(key.startswith(_OPTIMIZER) for key in others):
        return (
            "the optimizer's state in the checkpoint belongs to other parameters than this run's, "
            "and its format does not allow that: give the flags of its "
            f"run{differing}, or --no-load-optim to start CAME afresh from its weights."
        )
    if others:
        return (
            f"{others[0]} is {_size(asked.shapes[others[0]])} in this run and "
            f"{_size(saved[others[0]])} in the checkpoint: give the flags of its run{differing}."
        )
    return None


def left_over(asked: Asked, saved: Shapes) -> tuple[list[str], list[str]]:
    """Name what no rank asks a checkpoint for; collective.

    Returns:
        What the run would lose, and the optimizer's state of parameters that it does not train.
    """
    names = sorted(saved)
    taken = torch.tensor([name in asked.shapes for name in names], dtype=torch.int32)
    if dist.is_initialized():
        taken = taken.to("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    is_taken = dict(zip(names, map(bool, taken.tolist()), strict=True))
    left = [name for name, value in is_taken.items() if not value]
    if not any(name.startswith(_OPTIMIZER) for name in asked.shapes):
        return [name for name in left if not name.startswith(_OPTIMIZER)], []  # not loaded at all
    trained = {_parameter(name) for name, value in is_taken.items() if value}
    untrained = [
        name
        for name in left
        if _parameter(name) not in trained and is_taken.get(_parameter(name) or "")
    ]
    return [name for name in left if name not in set(untrained)], untrained


def _parameter(name: str) -> str | None:
    """The parameter that a tensor of the optimizer's state belongs to; None for any other."""
    if not name.startswith("optimizer.state."):
        return None
    return name.split(".", 3)[3]


def leftover_refusal(names: list[str], differing: str = "") -> str | None:
    """Say in one sentence that a checkpoint holds what this run would lose, or None."""
    if not names:
        return None
    weights = [name for name in names if not name.startswith(_OPTIMIZER)]
    if weights:
        return (
            f"the checkpoint holds {_named(weights)}, which the model lacks: give it the flags of "
            f"the checkpoint's run{differing}, or --no-load-optim or --finetune to train it on "
            "from those weights that fit."
        )
    return (
        f"the checkpoint holds {_named(names)}, which this run would leave behind: give the flags "
        f"of its run{differing}, or --no-load-optim to start CAME afresh from its weights."
    )


def notices(
    left: list[str], missing: Sequence[str] = (), untrained: Sequence[str] = ()
) -> list[str]:
    """Say in sentences what of a checkpoint is not taken, and what it lacks.

    Args:
        left: weights that are not taken.
        missing: weights that it lacks.
        untrained: the optimizer's state of parameters that this run does not train.
    """
    sentences = []
    if untrained:
        sentences.append(
            f"this run does not train all parameters of the checkpoint's: {_named(untrained)} "
            "is not taken."
        )
    if left:
        sentences.append(f"the checkpoint holds {_named(left)}, which the model lacks: left out.")
    if missing:
        sentences.append(f"the model has {_named(missing)}, which the checkpoint lacks: new.")
    return sentences


def vocabulary_change(asked: Asked, saved: Shapes) -> tuple[int, int] | None:
    """Return the rows of the vocabulary in the checkpoint and in this run, if they differ."""
    for key in asked.vocabulary:
        was, now = saved.get(key, ()), asked.shapes[key]
        for before, after in zip(was, now, strict=False):
            if before != after:
                return before, after
    return None


def vocabulary_sentence(before: int, after: int, saved: Any, args: Any) -> tuple[str, bool]:
    """Say what becomes of a vocabulary of another size, and whether that is to be refused."""
    tokens = getattr(saved, "vocab_size", None)
    what = (
        f"the vocabulary is padded to {after} rows in this run and to {before} in the checkpoint "
        "(--vocab-size, --make-vocab-size-divisible-by, --tensor-model-parallel-size or another "
        "tokenizer)"
    )
    if after < before and tokens is not None and tokens > after:
        return (
            f"{what}, and its {tokens} tokens would lose rows: give the flags of its run, or start "
            "a new one.",
            True,
        )
    if after < before:
        return f"{what}: its last {before - after} rows are left out.", False
    return (
        f"{what}: the {after - before} new rows start at zero, so that the model takes their "
        "tokens for likely and the loss begins higher.",
        False,
    )


def legacy_tensors(model_chunks: Iterable[Any], state: Mapping[str, Any]) -> tuple[Asked, Shapes]:
    """List what this rank asks a ``torch`` checkpoint for, and what the checkpoint's file holds.

    Args:
        model_chunks: of this rank.
        state: what the file holds.
    """
    chunks = list(model_chunks)
    mine: Shapes = {}
    its: Shapes = {}
    for index, chunk in enumerate(chunks):
        key, prefix = ("model", "") if len(chunks) == 1 else (f"model{index}", f"chunk {index}: ")
        mine |= _flat(chunk.state_dict_for_save_checkpoint(), prefix)
        its |= _flat(state.get(key), prefix)
    return Asked(mine, set()), its


def _flat(state: Any, prefix: str = "") -> Shapes:
    """Shapes of the tensors of a state dictionary, by name; of damaged ones, what there is."""
    shapes: Shapes = {}
    for key, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Mapping):
            shapes |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and not str(key).endswith("_extra_state"):
            shapes[f"{prefix}{key}"] = tuple(value.shape)
    return shapes


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
