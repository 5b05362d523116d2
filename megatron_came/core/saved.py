"""Momentum and main weights as checkpoints hold them, converted some elements at a time.

Checkpoints hold int8 momentum as bf16, and remainders and their weights as fp32. What is converted
goes to the CPU, where it is saved from and loaded to: beside the state its device holds a few MiB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_came.core.momentum import MOMENTUM, State, codec_of
from megatron_came.core.remainders import join, split
from megatron_came.core.state import REMAINDER

# Elements that are converted at once, whole blocks of int8; of each, up to 28 bytes of temporaries.
AT_ONCE = 1 << 18
# What this and the digests of a checkpoint take at most beside the state, on its device, in bytes.
MOST_BYTES = 64 * 2**20

# Where values begin in a slice, and the values, flat.
Ranges = Iterator[tuple[int, Tensor]]


def momentum_ranges(state: State) -> Ranges:
    """The momentum, as it goes into a checkpoint."""
    momentum = state[MOMENTUM].detach().view(-1)
    codec = codec_of(momentum.dtype)
    if codec.exact == momentum.dtype:
        yield 0, momentum
        return
    for begin in range(0, momentum.numel(), AT_ONCE):
        yield begin, codec.read(state, begin, min(begin + AT_ONCE, momentum.numel()))


def main_ranges(local: Tensor, state: State) -> Ranges:
    """The main weights, in fp32."""
    local = local.detach().view(-1)
    if REMAINDER not in state:
        yield 0, local
        return
    remainder = state[REMAINDER].view(-1)
    for begin in range(0, local.numel(), AT_ONCE):
        some = slice(begin, begin + AT_ONCE)
        yield begin, join(local[some], remainder[some])


def pieces(values: Tensor, start: int = 0) -> Ranges:
    """Values some at a time."""
    values = values.detach().reshape(-1)
    for begin in range(0, values.numel(), AT_ONCE):
        yield start + begin, values[begin : begin + AT_ONCE]


def saved_momentum(state: State, dtype: torch.dtype | None = None) -> Tensor:
    """Return the momentum in a checkpoint's dtype, by default one that holds the values exactly.

    Returns:
        The state's own tensor, or a copy on the CPU, in its shape.
    """
    momentum = state[MOMENTUM]
    dtype = dtype or codec_of(momentum.dtype).exact
    return momentum if momentum.dtype == dtype else _on_cpu(momentum_ranges(state), momentum, dtype)


def saved_weights(local: Tensor, state: State) -> Tensor:
    """Return the main weights: fp32 ones as they are, those in two halves copied to the CPU."""
    return local if REMAINDER not in state else copied_weights(local, state)


def copied_weights(local: Tensor, state: State) -> Tensor:
    """Copy the main weights to the CPU, in fp32."""
    return _on_cpu(main_ranges(local, state), local, torch.float32)


def _on_cpu(ranges: Ranges, like: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty(like.shape, dtype=dtype, device="cpu")
    flat = copy.view(-1)
    for start, values in ranges:
        for begin, some in pieces(values, start):
            flat[begin : begin + some.numel()].copy_(some)
    return copy


def set_momentum(state: State, values: Tensor, start: int = 0) -> None:
    """Write momentum, rounded to nearest where its dtype cannot hold the values.

    These are of any floating dtype and device; ``start`` is where they begin in the flat slice, at
    the beginning of a block.
    """
    momentum = state[MOMENTUM]
    codec = codec_of(momentum.dtype)
    for begin, some in pieces(values, start):
        codec.write(state, begin, some.to(momentum.device))


def set_weights(local: Tensor, state: State, values: Tensor) -> None:
    """Write main weights, in one tensor or two halves; of any device."""
    flat = local.detach().view(-1)
    remainder = state[REMAINDER].view(-1) if REMAINDER in state else None
    for begin, some in pieces(values):
        here = slice(begin, begin + some.numel())
        weights = some.to(local.device)
        if remainder is not None:
            weights, remainder[here] = split(weights)
        flat[here] = weights
