"""The passes over vectors, which have row statistics alone."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import storage, tables
from megatron_came.kernels.triton.blocks import inside_blocks
from megatron_came.kernels.triton.compiling import (
    GROUP_FIELDS,
    INT8_BLOCK,
    PARAM_FIELDS,
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    UPDATE_SCALE,
    UPDATE_UNSCALE,
    addresses_of,
    doubles,
    floats,
    kernel,
    over_lines,
    rates,
)
from megatron_came.kernels.triton.factors import inverse_divisor, new_moment


@triton.jit
def _vector(vectors, from_row):
    """A vector's row, its start and its number of elements."""
    vector = vectors + (tl.program_id(0) + from_row).to(tl.int64) * PARAM_FIELDS
    start = tl.load(vector + tables.ParamField.START)
    return vector, start, tl.load(vector + tables.ParamField.STOP) - start


@kernel
def square_vectors(from_row, vectors, BLOCK: tl.constexpr):
    """Twin of ``passes.add_squared_sums`` for a vector.

    Args:
        from_row: what the first program takes of the table.
        vectors: table of ``ParamField``, int64.
        BLOCK: elements that a program reads at once.
    """
    vector, start, size = _vector(vectors, from_row)
    address = tl.load(vector + tables.ParamField.GRAD)
    is_bf16 = tl.load(vector + tables.ParamField.GRAD_IS_BF16)
    out = doubles(tl.load(vector + tables.ParamField.SQUARE_ROW_SUMS)) + start
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        grad = storage.read(address, is_bf16, 0, index, mask, False) * SQUARE_SCALE
        tl.store(out + index, (grad * grad).to(tl.float64) * SQUARE_UNSCALE, mask=mask)


@kernel
def update_vector_moments(from_row, vectors, groups, BLOCK: tl.constexpr):
    """Twin of ``factors.update_moment`` and ``passes.add_squared_update`` for a vector."""
    vector, start, size = _vector(vectors, from_row)
    group = groups + tl.load(vector + tables.ParamField.GROUP) * GROUP_FIELDS
    moment = floats(tl.load(vector + tables.ParamField.SQUARE_ROW_FACTOR))
    sums = doubles(tl.load(vector + tables.ParamField.SQUARE_ROW_SUMS))
    eps = tl.load(group + tables.GroupField.EPS1)
    beta = tl.load(group + tables.GroupField.BETA2)
    for first in range(0, tl.load(vector + tables.ParamField.ROWS), BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < tl.load(vector + tables.ParamField.ROWS)
        new_moment(moment, tl.load(sums + index, mask=mask, other=0.0) + eps, beta, index, mask)
    tl.debug_barrier()  # the moment is read again
    address = tl.load(vector + tables.ParamField.GRAD)
    is_bf16 = tl.load(vector + tables.ParamField.GRAD_IS_BF16)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < size
        grad = storage.read(address, is_bf16, 0, index, mask, False)
        root = tl.sqrt_rn(tl.load(moment + start + index, mask=mask, other=1.0))
        update = grad * (1.0 / root * UPDATE_SCALE)
        total += (update * update).to(tl.float64)
    total_address = doubles(tl.load(vector + tables.ParamField.TOTAL))
    tl.store(total_address, tl.sum(total, 0) * UPDATE_UNSCALE)


@kernel
def apply_vectors(from_row, vectors, groups, APPLIED: tl.constexpr):
    """Twin of ``factors.clip_divisor`` and ``passes.apply_update`` for a vector."""
    vector, start, size = _vector(vectors, from_row)
    group = groups + tl.load(vector + tables.ParamField.GROUP) * GROUP_FIELDS
    inverse = inverse_divisor(
        tl.load(doubles(tl.load(vector + tables.ParamField.TOTAL))),
        tl.load(vector + tables.ParamField.FULL_NUMEL),
        tl.load(group + tables.GroupField.CLIP_THRESHOLD),
    ).to(tl.float32)
    beta1, rest, lr, decay = rates(group)
    moment = floats(tl.load(vector + tables.ParamField.SQUARE_ROW_FACTOR)) + start
    grads, momenta, scales, weights, remainders, model = addresses_of(vector)
    grad_is_bf16 = tl.load(vector + tables.ParamField.GRAD_IS_BF16)
    momenta_are_bf16 = tl.load(vector + tables.ParamField.EXP_AVG_IS_BF16)
    model_is_bf16 = tl.load(vector + tables.ParamField.MODEL_IS_BF16)
    key = storage.step_key(tl.load(vector + tables.ParamField.KEY), group)
    offset = tl.load(vector + tables.ParamField.ROW_OFFSET) + start
    part_rows = tl.load(vector + tables.ParamField.PART_ROWS)
    part_jump = tl.load(vector + tables.ParamField.PART_JUMP)
    blocks = tl.arange(0, APPLIED // INT8_BLOCK)
    for first in range(0, size, APPLIED):
        index = first + inside_blocks(APPLIED // INT8_BLOCK, 128, 1)
        mask = index < size
        block = first // INT8_BLOCK + blocks
        is_there = block * INT8_BLOCK < size
        grad = storage.read(grads, grad_is_bf16, 0, index, mask, False)
        root = tl.sqrt_rn(tl.load(moment + index, mask=mask, other=1.0))
        if scales != 0:
            scale = tl.load(floats(scales) + block, mask=is_there, other=0.0)
            momentum = storage.read_int8(momenta, 0, index, mask, False) * over_lines(scale, index)
        else:
            momentum = storage.read(momenta, momenta_are_bf16, 0, index, mask, False)
        momentum = beta1 * momentum + rest * (grad * (1.0 / root) * inverse)
        origin = offset + index + (start + index) // part_rows * part_jump
        random = storage.random_bits(origin, index * 0, key)
        storage.store_momentum(
            momenta, scales, momenta_are_bf16, scales, block, is_there, 0, index, momentum, mask,
            random, False,
        )  # fmt: skip
        weight = storage.read_weights(weights, remainders, remainders, 0, index, mask, False)
        weight -= decay * weight
        weight -= lr * momentum
        storage.store_weights(
            weights, remainders, model, remainders, model, model_is_bf16, 0, index, weight, mask,
            False,
        )  # fmt: skip
