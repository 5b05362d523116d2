"""Digests are computed before a checkpoint is saved, and saved with it."""

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.digests import MAIN_WEIGHTS, MOMENTUM, WEIGHTS
from megatron_came.core.records import KEY, InBucket, Record, pack
from megatron_came.core.saved import main_ranges, momentum_ranges
from megatron_came.dtensors import local_of, state_here
from megatron_came.megatron.checkpoints.digests.leaves import (
    Entry,
    entries_of,
    untrained,
    unwrapped,
)
from megatron_came.megatron.checkpoints.digests.sums import KINDS, Sums, Totals, distinct
from megatron_came.megatron.checkpoints.unwritten import failures_said
from megatron_came.megatron.run import run_args
from megatron_came.megatron.sharding import chain_of
from megatron_came.patching import Function
from megatron_came.voice import of_all_ranks, say, stop

OF_BUCKETS = (MAIN_WEIGHTS, MOMENTUM)
# What goes into the checkpoint that is being saved.
_record: ContextVar[str | None] = ContextVar("record", default=None)


def with_digests(
    original: Function, iteration: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Compute the digests of what is about to be saved."""
    settings = run_args()
    if settings.optimizer != "came":
        return original(iteration, model, optimizer, *args, **kwargs)
    saved = None if settings.no_save_optim else optimizer
    has_buckets = (
        settings.use_distributed_optimizer
        and settings.ckpt_format == "torch_dist"
        and not settings.dist_ckpt_optim_fully_reshardable
    )
    # In these formats ranks save copies, too (tied embeddings, tensor-parallel replicas), and each
    # loads its own.
    own = KINDS if settings.ckpt_format == "torch" else OF_BUCKETS if has_buckets else ()
    record, flaw = record_of(iteration, unwrapped(model), saved, buckets=has_buckets, own=own)
    if flaw is not None:
        _refuse_or_say(f"iteration {iteration}, {flaw}", settings)
    token = _record.set(pack(record))
    try:
        with failures_said(f"iteration {iteration}", settings.save):
            return original(iteration, model, optimizer, *args, **kwargs)
    finally:
        _record.reset(token)


def with_record(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Add them to what is saved."""
    state = original(*args, **kwargs)
    record = _record.get()
    if record is not None:  # Megatron makes a state dictionary of what it loads, too
        state[KEY] = record
    return state


def _refuse_or_say(flaw: str, settings: Any) -> None:
    """End all ranks instead of saving what cannot be trained on, unless nobody is to look."""
    if settings.check_for_nan_in_loss_and_grad:
        stop(
            f"{flaw}; nothing of this iteration is saved: resume from the last checkpoint with "
            "other data, a lower learning rate or stronger clipping, or give "
            "--no-check-for-nan-in-loss-and-grad to save it all the same."
        )
    say(f"{flaw}; it is saved so, and refused when it is loaded, unless with --came-no-verify.")


@torch.no_grad()
def record_of(
    iteration: int,
    model_chunks: Sequence[Any],
    optimizer: Any,
    *,
    buckets: bool = False,
    own: Sequence[str] = (),
) -> tuple[Record, str | None]:
    """Compute the record of a model and its optimizer; a collective over all ranks.

    Chunks are without their wrappers; without an optimizer it is that of the weights alone.
    ``buckets`` says whether the optimizer's state is saved in Megatron's buckets, ``own`` of which
    kinds each rank saves its own, copies too.

    Returns:
        The record, and in a clause which of them on which rank holds NaN, an infinity or, of what
        are means of squares, a negative number; None if none does.
    """
    entries, frozen = entries_of(model_chunks), untrained(model_chunks)
    wrappers = wrappers_of(optimizer)
    sums = Sums(entries)
    shared: set[int] = set()
    with torch._C.DisableTorchFunction():  # of stand-ins for CUDA, which these sums do not need
        for wrapper in wrappers:
            shared |= add_optimizer(sums, wrapper, entries)
        for key, entry in entries.items():
            if key not in shared:
                sums.add_weights(entry, is_trained=key not in frozen)
        sums.flush()
    mine = (sums.names, steps_of(wrappers), _buckets(optimizer, entries) if buckets else {})
    names, steps, inside = zip(*distinct(mine), strict=True)
    all_steps = set(chain(*steps))
    totals = sums.over_all_ranks(tuple(chain(*names)))
    record = Record(
        iteration=int(iteration),
        optimizer="came",
        step=all_steps.pop() if len(all_steps) == 1 else None,  # none without an optimizer
        tensors=totals.tensors,
        copies={kind: named for kind, named in totals.copies.items() if kind in own},
        buckets=dict(chain.from_iterable(found.items() for found in inside)),
    )
    return record, _flaw(totals, sums)


def _flaw(totals: Totals, sums: Sums) -> str | None:
    if not totals.flaws:
        return None
    (kind, name, flaw), *others = totals.flaws
    owner = of_all_ranks((kind, name) in sums.flawed).index(True)
    more = f" (and {len(others)} more)" if others else ""
    return f"rank {owner}: {kind} of {name}{more} holds {flaw}"


def wrappers_of(optimizer: Any) -> list[Any]:
    """The optimizers of a chain that hold a CAME; none of None."""
    return [each for each in chain_of(optimizer) if getattr(each, "optimizer", None) is not None]


def steps_of(wrappers: Sequence[Any]) -> list[int]:
    """The numbers of steps that parameter groups have taken."""
    groups = [group for wrapper in wrappers for group in wrapper.optimizer.param_groups]
    return sorted({int(group.get("step", 0)) for group in groups})


def is_sliced(wrapper: Any) -> bool:
    """Whether an optimizer is a distributed one, which holds slices and always main weights."""
    return hasattr(wrapper, "gbuf_ranges")  # of Megatron's DistributedOptimizer


def has_main_weights(param: Tensor, local: Tensor) -> bool:
    """Whether an optimizer updates something else than a parameter, or what a rank holds of it."""
    return local is not param and local is not local_of(param)


def counts(wrapper: Any) -> bool:
    """Whether an optimizer's slices are to be counted: other instances hold the same."""
    return not getattr(wrapper, "distributed_optimizer_instance_id", 0)


def add_optimizer(sums: Sums, wrapper: Any, entries: dict[int, Entry]) -> set[int]:
    """Add an optimizer's state; returns the entries whose weights are its main weights."""
    shared: set[int] = set()
    for param, local in wrapper._pairs:
        entry = entries.get(id(param))
        if entry is None:
            continue
        shard, state = wrapper.optimizer.shard_of(local), state_here(wrapper.optimizer.state[local])
        sums.add_factors(entry, state)
        # Of fp32 weights the slices are views, and need to be read only once.
        same = (
            is_sliced(wrapper)
            and param.dtype == torch.float32
            and all(leaf.copy is None for leaf in entry.leaves)
        )
        if same:
            shared.add(id(param))
        if not counts(wrapper):
            continue
        start = shard.start if is_sliced(wrapper) else entry.start
        if is_sliced(wrapper) or has_main_weights(param, local):
            kinds = (MAIN_WEIGHTS, WEIGHTS) if same else (MAIN_WEIGHTS,)
            sums.add_slice(kinds, entry, main_ranges(local_of(local), state), start)
        sums.add_slice((MOMENTUM,), entry, momentum_ranges(state), start)
    return shared


def _buckets(optimizer: Any, entries: dict[int, Entry]) -> dict[str, tuple[InBucket, ...]]:
    """Say where parameters lie in buckets; ranks that share these say the same."""
    found: dict[str, tuple[InBucket, ...]] = {}
    chain = chain_of(optimizer)
    for position, wrapper in enumerate(chain):
        prefix = f"chained_{position}." if len(chain) > 1 else ""  # as Megatron's chain has it
        if getattr(wrapper, "optimizer", None) is None or not counts(wrapper):
            continue
        for index, ranges in enumerate(getattr(wrapper, "gbuf_ranges", ())):
            buffer = wrapper.buffers[index]
            for dtype in ranges:
                for bucket in buffer.buckets:
                    key = (
                        f"{prefix}optimizer.distributed.dp_group_idx_"
                        f"{wrapper.data_parallel_group_idx}.gbuf_idx_{index}.dtype_{dtype}"
                        f".bucket_idx_{bucket.bucket_id}"
                    )
                    found[key] = tuple(_inside(buffer, bucket, entries))
    return found


def _inside(buffer: Any, bucket: Any, entries: dict[int, Entry]) -> Iterator[InBucket]:
    for param, (start, _, number) in buffer.param_index_map.items():
        if number == bucket.bucket_id and id(param) in entries:
            yield InBucket(
                start - bucket.offset,
                tuple(param.shape),
                tuple((leaf.name, leaf.box) for leaf in entries[id(param)].views),
            )
