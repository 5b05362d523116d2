"""A parameter's state: keys, shapes and dtypes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.momentum import codec_of
from megatron_came.core.shard import Shard

# Factors, in the order r, c, R, C, v; and the axis of the parameter that each is an average over.
AVERAGED_AXIS: dict[str, int | None] = {
    "exp_avg_sq_row": -1,
    "exp_avg_sq_col": -2,
    "exp_avg_res_row": -1,
    "exp_avg_res_col": -2,
    "exp_avg_sq": None,
}
FACTORS = tuple(AVERAGED_AXIS)
MATRIX_FACTORS, VECTOR_FACTORS = FACTORS[:4], FACTORS[4:]
SECOND_MOMENTS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
REMAINDER = "remainder"
STEP = "step"  # that a parameter has taken, of which its group may have taken more


def own_count(state: Mapping[str, Any]) -> Tensor | None:
    """Return a parameter's own number of steps, if it counts them.

    A number or a float of that name is somebody else's: Megatron's wrappers and the authors' class
    put one there.
    """
    count = state.get(STEP)
    return count if isinstance(count, Tensor) and not count.is_floating_point() else None


def without_averaged_axis[Entry](key: str, of_axes: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Return what a parameter has of each axis (sizes, say) for the axes that a factor keeps."""
    axis = AVERAGED_AXIS[key]
    if axis is None:
        return of_axes
    axis += len(of_axes)
    return of_axes[:axis] + of_axes[axis + 1 :]


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's factors, and of the arithmetic.

    Never 16-bit, where a slow moving average stands still.
    """
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def has_remainder(param: Tensor, remainders: bool) -> bool:
    """Return whether a parameter is the upper half of fp32 weights."""
    return remainders and param.dtype == torch.bfloat16


def trust_all(state: dict[str, Tensor]) -> None:
    """Set R and C of a parameter's state to one, which they are without confidence."""
    for key in MATRIX_FACTORS[2:]:
        if key in state:
            state[key].fill_(1.0)


def new_state(
    param: Tensor, shard: Shard, momentum: torch.dtype = torch.float32, remainders: bool = False
) -> dict[str, Tensor]:
    """Return a parameter's state before its first step.

    State of a parameter whose whole local tensor has the shape (..., n, m); fp32, or float64 for
    float64 parameters:

    ====================  =========================  ==========================================
    ``exp_avg``           like the parameter         momentum m of this rank's slice, in
                                                     ``momentum_dtype``
    ``exp_avg_scale``     (ceil(elements / 256),)    int8 alone: ``exp_avg`` is to be multiplied
                                                     by these, in blocks along the flat slice
    ``remainder``         like the parameter         int16: the lower halves of fp32 weights
    ``exp_avg_sq_row``    (..., n)                   r, whole on every data-parallel rank
    ``exp_avg_sq_col``    (..., m)                   c, likewise
    ``exp_avg_res_row``   (..., n)                   R, likewise
    ``exp_avg_res_col``   (..., m)                   C, likewise
    ``exp_avg_sq``        (n,), or (..., n, m) of    v, instead of the four factors; whole
                          what is not factored
    ====================  =========================  ==========================================

    With bias correction ``step`` joins them: :func:`megatron_came.group_table.count_steps`.

    Args:
        param: the slice.
        shard: where it lies.
        momentum: wanted dtype of the momentum.
        remainders: keep the lower halves of the fp32 weights of bf16 parameters.
    """
    device = param.device
    # Float64 parameters keep their momentum in float64, too.
    state = codec_of(torch.float64 if param.dtype == torch.float64 else momentum).new(param)
    if has_remainder(param, remainders):
        state[REMAINDER] = torch.zeros(param.shape, dtype=torch.int16, device=device)
    for key in VECTOR_FACTORS if shard.is_vector else MATRIX_FACTORS:
        shape = without_averaged_axis(key, shard.shape)
        state[key] = torch.zeros(shape, dtype=state_dtype(param), device=device)
    return state
