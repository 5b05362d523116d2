"""A parameter's state: keys, shapes, dtypes, and its conversion from one dtype to another."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from megatron_came.core import int8
from megatron_came.core.shard import Shard

MATRIX_FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
VECTOR_FACTORS = ("exp_avg_sq",)
FACTORS = (*MATRIX_FACTORS, *VECTOR_FACTORS)
MOMENTUM, SCALE, REMAINDER = "exp_avg", "exp_avg_scale", "remainder"
MOMENTUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def state_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state.

    Never 16-bit, where a slow moving average stands still; but see :func:`momentum_dtype`.
    """
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def momentum_dtype(param: Tensor, wanted: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter's momentum: float64 parameters keep theirs."""
    return torch.float64 if param.dtype == torch.float64 else wanted


def check_momentum_dtype(wanted: object) -> None:
    """Refuse a dtype that momentum cannot have.

    Raises:
        ValueError: it is another one.
    """
    dtypes = MOMENTUM_DTYPES.values()
    if wanted not in dtypes:
        raise ValueError(
            f"CAME: momentum_dtype {wanted} is not one of {', '.join(map(str, dtypes))}."
        )


def has_remainder(param: Tensor, remainders: bool) -> bool:
    """Return whether a parameter is the upper half of fp32 weights."""
    return remainders and param.dtype == torch.bfloat16


def new_state(
    param: Tensor,
    shard: Shard,
    momentum: torch.dtype = torch.float32,
    remainders: bool = False,
) -> dict[str, Tensor]:
    """Return a parameter's state before its first step, with the keys of :class:`CAME`.

    Args:
        param: the slice.
        shard: where it lies.
        momentum: wanted dtype of the momentum.
        remainders: keep the lower halves of the fp32 weights of bf16 parameters.
    """
    zeros = partial(torch.zeros, dtype=state_dtype(param), device=param.device)
    state = {MOMENTUM: zeros(param.shape, dtype=momentum_dtype(param, momentum))}
    if state[MOMENTUM].dtype == torch.int8:
        state[SCALE] = zeros(int8.blocks(param.numel()))
    if has_remainder(param, remainders):
        state[REMAINDER] = zeros(param.shape, dtype=torch.int16)
    if shard.is_vector:
        state["exp_avg_sq"] = zeros(shard.shape)
    else:
        row, column = shard.shape[:-1], (*shard.shape[:-2], shard.shape[-1])
        for key, shape in zip(MATRIX_FACTORS, (row, column, row, column), strict=True):
            state[key] = zeros(shape)
    return state


def momentum_of(state: Mapping[str, Tensor]) -> Tensor:
    """Return the momentum in a dtype that holds its values exactly by itself.

    int8 becomes bf16, of the same shape; other dtypes are returned as they are.
    """
    momentum = state[MOMENTUM]
    if momentum.dtype != torch.int8:
        return momentum
    return int8.dequantize(momentum, state[SCALE]).to(torch.bfloat16)


def set_momentum(state: dict[str, Tensor], values: Tensor) -> None:
    """Write momentum, rounded to nearest where its dtype cannot hold the values.

    Args:
        state: with the momentum in its dtype.
        values: of any floating dtype, with as many elements.
    """
    momentum = state[MOMENTUM]
    if momentum.dtype != torch.int8:
        momentum.copy_(values.view(momentum.shape))
        return
    flat = values.to(momentum.device, torch.float32).reshape(-1)
    quantized, scale = int8.quantize(flat)
    momentum.copy_(quantized.view(momentum.shape))
    state[SCALE].copy_(scale)
