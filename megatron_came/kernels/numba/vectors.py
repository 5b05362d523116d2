"""The passes over vectors, which have row statistics alone."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import math

import numpy as np

from megatron_came.kernels.numba import factors, storage
from megatron_came.kernels.numba.compiling import (
    ONE,
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    doubles,
    floats,
    inline,
    shorts,
)
from megatron_came.kernels.tables import GroupField as Group
from megatron_came.kernels.tables import VectorField as Vector


@inline
def _whole(vector, address, is_bf16):
    """All elements of a slice of a vector in fp32."""
    count = vector[Vector.STOP] - vector[Vector.START]
    if not is_bf16:
        return floats(address, count)
    out = np.empty(count, np.float32)
    storage.read_bf16(shorts(address, count), out)
    return out


@inline
def _vector_gradient(vector):
    return _whole(vector, vector[Vector.GRAD], vector[Vector.GRAD_IS_BF16])


@inline
def square_vectors(first, stop, vectors):
    """Twin of ``passes.add_squared_sums`` for vectors."""
    for index in range(first, stop):
        vector = vectors[index]
        grad = _vector_gradient(vector)
        out = doubles(vector[Vector.SQUARES] + 8 * vector[Vector.START], grad.size)
        for i in range(grad.size):
            scaled = grad[i] * SQUARE_SCALE
            out[i] = np.float64(scaled * scaled) * SQUARE_UNSCALE


@inline
def update_vector_moments(first, stop, vectors, groups):
    """Twin of ``factors.update_moment`` and ``passes.add_squared_update`` for vectors."""
    for index in range(first, stop):
        vector = vectors[index]
        group = groups[vector[Vector.GROUP]]
        size, start = vector[Vector.SIZE], vector[Vector.START]
        moment = floats(vector[Vector.MOMENT], size)
        factors.update_moment(
            moment,
            doubles(vector[Vector.SQUARES], size),
            1,
            group[Group.EPS1],
            group[Group.BETA2],
        )
        grad = _vector_gradient(vector)
        total = 0.0
        for i in range(grad.size):
            update = grad[i] * (ONE / math.sqrt(moment[start + i]))
            total += np.float64(update * update)
        doubles(vector[Vector.TOTAL], 1)[0] = total


@inline
def _vector_bits(vector):
    """Random bits of a slice of a vector, part by part."""
    start, stop = vector[Vector.START], vector[Vector.STOP]
    bits = np.empty(stop - start, np.uint16)
    place = start
    while place < stop:
        part = place // vector[Vector.PART_ROWS]
        end = min((part + 1) * vector[Vector.PART_ROWS], stop)
        full_place = vector[Vector.OFFSET] + place + part * vector[Vector.PART_JUMP]
        storage.draw(full_place, vector[Vector.KEY], bits[place - start : end - start])
        place = end
    return bits


@inline
def apply_vectors(first, stop, vectors, groups):
    """Twin of ``factors.clip_divisor`` and ``passes.apply_update`` for vectors."""
    for index in range(first, stop):
        vector = vectors[index]
        group = groups[vector[Vector.GROUP]]
        moment = floats(vector[Vector.MOMENT], vector[Vector.SIZE])[vector[Vector.START] :]
        grad = _vector_gradient(vector)
        remainders, scales = vector[Vector.REMAINDER], vector[Vector.EXP_AVG_SCALE]
        buffer = np.empty(grad.size, np.float32)
        param = storage.weights(vector[Vector.PARAM], remainders, 0, grad.size, buffer)
        if scales:
            exp_avg = np.empty(grad.size, np.float32)
            storage.read_int8(vector[Vector.EXP_AVG], scales, 0, grad.size, exp_avg)
        else:
            exp_avg = _whole(vector, vector[Vector.EXP_AVG], vector[Vector.EXP_AVG_IS_BF16])
        inverse_divisor = np.float32(
            factors.inverse_divisor(
                doubles(vector[Vector.TOTAL], 1)[0],
                vector[Vector.FULL_NUMEL],
                group[Group.CLIP_THRESHOLD],
            )
        )
        beta1, rest = np.float32(group[Group.BETA1]), np.float32(1.0 - group[Group.BETA1])
        lr = np.float32(group[Group.LR])
        decay = np.float32(group[Group.LR] * group[Group.WEIGHT_DECAY])
        for i in range(grad.size):
            update = grad[i] * (ONE / math.sqrt(moment[i])) * inverse_divisor
            momentum = beta1 * exp_avg[i] + rest * update
            exp_avg[i] = momentum
            weight = param[i]
            weight -= decay * weight
            param[i] = weight - lr * momentum
        if vector[Vector.EXP_AVG_IS_BF16] or scales:
            bits = _vector_bits(vector)
            address, is_bf16 = vector[Vector.EXP_AVG], vector[Vector.EXP_AVG_IS_BF16]
            storage.keep_momentum(address, is_bf16, scales, 0, exp_avg, bits)
        storage.keep_weights(vector[Vector.PARAM], remainders, 0, param)
        storage.copy_to_model(vector[Vector.MODEL_WEIGHT], 0, param)
