"""Buckets of Megatron's buffers in checkpoints: what is padding, and what lies where.

A buffer holds the parameters of one dtype, each from a multiple of 64 elements on, in buckets
whose ends are padded to a size that the data-parallel ranks can share. Where the state of a buffer
is gathered, the padding at the ends of buckets is left out, and what lies between parameters is
kept.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_came.voice import say_once

_ALIGNMENT = 64  # of the parameters' first elements

# Where each parameter of a buffer lies in what is gathered of it: first element, last + 1.
Spans = list[tuple[int, int]]


def gathered_index(buffer: Any) -> dict[Tensor, tuple[int, int, int]]:
    """Copy ``buffer.param_index_map`` with the offsets that parameters have when it is gathered."""
    left_out = [0]  # before each bucket
    for bucket in buffer.buckets:
        left_out.append(left_out[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        param: (start - left_out[bucket], end - left_out[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def mended() -> bool:
    """Whether Megatron takes the padding of buckets into account there, which 0.20 is to do."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # By its code, not its release: a development version may be from before that or after.
    method = DistributedOptimizer.sharded_param_state_fully_reshardable
    return "buckets" in method.__code__.co_names


@contextlib.contextmanager
def offsets_as_gathered(buffers: Iterable[Any]) -> Iterator[None]:
    """Make ``sharded_param_state_fully_reshardable`` cut gathered buffers at the right places.

    Unless it is :func:`mended`, Megatron takes the offsets of the buffer itself there, so that it
    saves everything behind the first padded bucket shifted (NVIDIA/Megatron-LM#5077).
    """
    if mended():
        yield
        return
    own = [(buffer, buffer.param_index_map) for buffer in buffers]
    try:
        for buffer, _ in own:
            buffer.param_index_map = gathered_index(buffer)
        yield
    finally:
        for buffer, index in own:
            buffer.param_index_map = index


def with_padding(
    pieces: list[dict[str, Any]],
    bucket: Any,
    ranks: tuple[int, int],
    dtypes: dict[str, torch.dtype],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Complete a rank's pieces of a bucket, for ``dp_reshardable``, to all that the file has.

    Megatron fills gaps itself, but stops where a rank has no piece (NVIDIA/Megatron-LM#6191),
    writes beyond the end of the file where a bucket ends in a gap (#5898), and fills them with
    what happens to be in the memory.

    Args:
        pieces: of parameters, in order.
        bucket: that they lie in.
        ranks: this rank, and how many share the bucket.
        dtypes: of what each piece holds, by name.
        device: where to make the padding.
    """
    rank, size = ranks
    local = bucket.grad_data.numel() // size
    end = min(local, bucket.numel_unpadded - rank * local)  # negative: all lies beyond the end

    def padding(start: int, stop: int) -> dict[str, Any]:
        zeros = {
            key: torch.zeros(stop - start, dtype=dtype, device=device)
            for key, dtype in dtypes.items()
        }
        return {**zeros, "gbuf_local_start": start, "gbuf_local_end": stop, "padding": True}

    if end <= 0:
        return [padding(end, end)]  # without elements: where there is none, Megatron stops
    completed, position = [], 0
    for piece in pieces:
        if piece["gbuf_local_start"] > position:
            completed.append(padding(position, piece["gbuf_local_start"]))
        completed.append(piece)
        position = piece["gbuf_local_end"]
    if position < end:
        completed.append(padding(position, end))
    return completed


def spans_of(buffers: Iterable[Any]) -> list[Spans]:
    """Where the parameters of each buffer lie in what is gathered of it."""
    return [
        [(start, end) for start, end, _ in gathered_index(buffer).values()] for buffer in buffers
    ]


def arrangement_problem(gathered: dict[Any, Any], buffers: Sequence[Any]) -> str | None:
    """Say in one sentence why a legacy file cannot be brought into a run's buffers, or None.

    It holds by index of the buffer what was gathered of it; where each parameter lies in that
    stands under ``came``, except in files of 0.1.0.
    """
    spans = gathered["came"].get("spans")
    if spans is None:
        sizes = [_tensors(gathered, index)["numel_unpadded"] for index in range(len(buffers))]
        if sizes == [buffer.numel_unpadded for buffer in buffers]:
            # Another cut may have as many elements where a gap was left out at an end.
            ends = [each.numel_unpadded for buffer in buffers for each in buffer.buckets[:-1]]
            if any(end % _ALIGNMENT for end in ends):
                say_once(
                    "the legacy checkpoint does not say how it was cut into buckets: its optimizer "
                    "state is read as if that had been done with the flags of this run."
                )
            return None
        return (
            "the checkpoint does not say how it was cut into buckets, and it was in another way: "
            "resume with the --overlap-grad-reduce, --ddp-bucket-size, --ddp-num-buckets and "
            "data-parallel size that it was saved with, or give --no-load-optim."
        )
    before, now = (
        [[end - start for start, end in each] for each in part]
        for part in (spans, spans_of(buffers))
    )
    if before == now:
        return None
    return (
        "the checkpoint's parameters are of other sizes or in another order than the model's: "
        "load it with the flags it was saved with, or give --no-load-optim."
    )


def arrange(gathered: dict[Any, Any], buffers: Sequence[Any]) -> None:
    """Move what a legacy file holds to where these buffers' own cut into buckets has it."""
    spans = gathered["came"].get("spans")
    for index, (buffer, wanted) in enumerate(zip(buffers, spans_of(buffers), strict=True)):
        if spans is None or spans[index] == wanted:
            continue
        tensors = _tensors(gathered, index)
        for key in ("param", "exp_avg"):
            moved = tensors[key].new_zeros(buffer.numel_unpadded)  # gaps stay zero
            for (start, end), (new_start, new_end) in zip(spans[index], wanted, strict=True):
                moved[new_start:new_end] = tensors[key][start:end]
            tensors[key] = moved
        tensors["numel_unpadded"] = buffer.numel_unpadded


def _tensors(gathered: dict[Any, Any], index: int) -> dict[str, Any]:
    """What was gathered of a buffer, which has one dtype."""
    (tensors,) = gathered[index].values()
    found: dict[str, Any] = tensors
    return found


def cast_momentum(gathered: dict[Any, Any], dtype: torch.dtype) -> None:
    """Cast the momentum among what Megatron has gathered of each buffer."""
    for buffers in gathered.values():
        for tensors in buffers.values() if isinstance(buffers, dict) else ():
            if isinstance(tensors, dict) and "exp_avg" in tensors:
                tensors["exp_avg"] = tensors["exp_avg"].to(dtype)
