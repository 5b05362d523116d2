"""A parameter's state: keys, shapes and dtypes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_came.layout import Shard

MATRIX_FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
VECTOR_FACTORS = ("exp_avg_sq",)
FACTORS = (*MATRIX_FACTORS, *VECTOR_FACTORS)


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state.

    Never 16-bit, where a slow moving average stands still; but see :func:`momentum_dtype`.
    """
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def momentum_dtype(param: Tensor, wanted: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter's momentum: float64 parameters keep theirs."""
    return torch.float64 if param.dtype == torch.float64 else wanted


def new_state(
    param: Tensor, shard: Shard, momentum: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return a parameter's state before its first step, with the keys of :class:`CAME`.

    Args:
        param: the slice.
        shard: where it lies.
        momentum: wanted dtype of the momentum.
    """
    zeros = partial(torch.zeros, dtype=state_dtype(param), device=param.device)
    state = {"exp_avg": zeros(param.shape, dtype=momentum_dtype(param, momentum))}
    if shard.is_vector:
        state["exp_avg_sq"] = zeros(shard.shape)
    else:
        row, column = shard.shape[:-1], (*shard.shape[:-2], shard.shape[-1])
        for key, shape in zip(MATRIX_FACTORS, (row, column, row, column), strict=True):
            state[key] = zeros(shape)
    return state
