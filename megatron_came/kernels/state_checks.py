"""What the tensors of a state must be, so that nothing is read or written beyond their ends."""

import math
from collections.abc import Mapping

import torch

from megatron_came.core import int8
from megatron_came.core.momentum import MOMENTUM, MOMENTUM_DTYPES, SCALE, State
from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.state import (
    MATRIX_FACTORS,
    REMAINDER,
    VECTOR_FACTORS,
    has_remainder,
    without_averaged_axis,
)

Wanted = tuple[int, tuple[torch.dtype, ...]]  # how many elements, of one of these dtypes


def is_int8_momentum(state: State) -> bool:
    """Whether a parameter's momentum is."""
    return MOMENTUM in state and state[MOMENTUM].dtype == torch.int8


def wanted_state(slice_: ParameterSlice, is_int8: bool) -> dict[str, Wanted]:
    """Return all that kernels touch of a parameter's state."""
    numel = slice_.shard.numel
    wanted: dict[str, Wanted] = {MOMENTUM: (numel, tuple(MOMENTUM_DTYPES.values()))}
    if is_int8:
        wanted[SCALE] = int8.blocks(numel), (torch.float32,)
    if has_remainder(slice_.param, slice_.remainders):
        wanted[REMAINDER] = numel, (torch.int16,)
    for key in VECTOR_FACTORS if slice_.shard.is_vector else MATRIX_FACTORS:
        shape = without_averaged_axis(key, slice_.shard.shape)
        wanted[key] = math.prod(shape), (torch.float32,)
    return wanted


def check_eager_state(slice_: ParameterSlice, state: State) -> None:
    """Compare a parameter's state with what eager PyTorch computes with: as kernels, or in float64.

    In fewer bits a slow moving average stands still, and nothing else would say so.

    Raises:
        ValueError: as :func:`check_state`.
    """
    wanted = wanted_state(slice_, is_int8_momentum(state))
    for key, (numel, dtypes) in wanted.items():
        if torch.float32 in dtypes and key != SCALE:  # codes are read with fp32 ones alone
            wanted[key] = numel, (*dtypes, torch.float64)
    check_state(slice_, state, wanted)


def check_state(slice_: ParameterSlice, state: State, wanted: Mapping[str, Wanted]) -> None:
    """Compare a parameter's state with what kernels rely on.

    Raises:
        ValueError: another size, dtype, device or layout, or none; or halves of other weights.
    """
    if REMAINDER in state and REMAINDER not in wanted:
        raise ValueError(
            f"CAME: a parameter of shape {slice_.shard.shape} is {slice_.param.dtype}, and its "
            f"state {REMAINDER!r} completes bf16 weights, as it was trained so far: turn it back, "
            "or make a new optimizer."
        )
    for key, (numel, dtypes) in wanted.items():
        if key not in state:
            raise ValueError(
                f"CAME: a parameter of shape {slice_.shard.shape} has no state {key!r}: it "
                "belongs to another model, or something has taken it away."
            )
        value = state[key]
        fits = value.numel() == numel and value.dtype in dtypes and value.is_contiguous()
        if not fits or value.device != slice_.param.device:
            raise ValueError(
                f"CAME: state {key!r} of a parameter of shape {slice_.shard.shape} has the "
                f"shape {tuple(value.shape)}, {value.dtype}, on {value.device}: it belongs to "
                "another model, or something has changed it."
            )
