"""The passes over vectors, which have row statistics alone."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import math

import numpy as np

from megatron_came.core.int8 import BLOCK as INT8_BLOCK
from megatron_came.kernels.cpu import factors, storage
from megatron_came.kernels.cpu.compiling import (
    ONE,
    SQUARE_SCALE,
    SQUARE_UNSCALE,
    UPDATE_SCALE,
    UPDATE_UNSCALE,
    doubles,
    floats,
    inline,
    shorts,
)
from megatron_came.kernels.triton.tables import GroupField as Group
from megatron_came.kernels.triton.tables import VectorField as Vector


@inline
def _block(buffer):
    """Elements that are taken at once: whole blocks of int8."""
    return buffer.size // INT8_BLOCK * INT8_BLOCK


@inline
def _read(address, is_bf16, offset, count, buffer):
    """Elements of a gradient or momentum in fp32: their own memory, or the buffer."""
    if not is_bf16:
        return floats(address + 4 * offset, count)
    out = buffer[:count]
    storage.read_bf16(shorts(address + 2 * offset, count), out)
    return out


@inline
def _gradient(vector, offset, count, buffer):
    return _read(vector[Vector.GRAD], vector[Vector.GRAD_IS_BF16], offset, count, buffer)


@inline
def _momentum(vector, offset, count, buffer):
    address, scales = vector[Vector.EXP_AVG], vector[Vector.EXP_AVG_SCALE]
    if not scales:
        return _read(address, vector[Vector.EXP_AVG_IS_BF16], offset, count, buffer)
    out = buffer[:count]
    storage.read_int8(address, scales, offset, count, out)
    return out


@inline
def square_vectors(first, stop, vectors, buffers):
    """Twin of ``passes.add_squared_sums`` for vectors.

    Args:
        first: row of the table of vectors.
        stop: one past the last row.
        vectors: table of ``VectorField``.
        buffers: this thread's, see ``tiles.buffers_in``.
    """
    buffer = buffers[0]
    for index in range(first, stop):
        vector = vectors[index]
        numel = vector[Vector.STOP] - vector[Vector.START]
        out = doubles(vector[Vector.SQUARES] + 8 * vector[Vector.START], numel)
        for offset in range(0, numel, _block(buffer)):
            grad = _gradient(vector, offset, min(_block(buffer), numel - offset), buffer)
            for i in range(grad.size):
                scaled = grad[i] * SQUARE_SCALE
                out[offset + i] = np.float64(scaled * scaled) * SQUARE_UNSCALE


@inline
def update_vector_moments(first, stop, vectors, groups, buffers):
    """Twin of ``factors.update_moment`` and ``passes.add_squared_update`` for vectors."""
    buffer = buffers[0]
    for index in range(first, stop):
        vector = vectors[index]
        group = groups[vector[Vector.GROUP]]
        size, start = vector[Vector.SIZE], vector[Vector.START]
        numel = vector[Vector.STOP] - start
        moment = floats(vector[Vector.MOMENT], size)
        factors.update_moment(
            moment,
            doubles(vector[Vector.SQUARES], size),
            1,
            group[Group.EPS1],
            group[Group.BETA2],
        )
        total = 0.0
        for offset in range(0, numel, _block(buffer)):
            grad = _gradient(vector, offset, min(_block(buffer), numel - offset), buffer)
            for i in range(grad.size):
                scale = ONE / math.sqrt(moment[start + offset + i]) * UPDATE_SCALE
                update = grad[i] * scale
                total += np.float64(update * update)
        doubles(vector[Vector.TOTAL], 1)[0] = total * UPDATE_UNSCALE


@inline
def _draw(vector, key, offset, bits):
    """Random bits of elements from an offset in the slice on, part by part."""
    start = place = vector[Vector.START] + offset
    stop = start + bits.size
    while place < stop:
        part = place // vector[Vector.PART_ROWS]
        end = min((part + 1) * vector[Vector.PART_ROWS], stop)
        full_place = vector[Vector.OFFSET] + place + part * vector[Vector.PART_JUMP]
        storage.draw(full_place, key, bits[place - start : end - start])
        place = end


@inline
def apply_vectors(first, stop, vectors, groups, buffers):
    """Twin of ``factors.clip_divisor`` and ``passes.apply_update`` for vectors."""
    grads, momenta, weights, all_bits = buffers
    for index in range(first, stop):
        vector = vectors[index]
        group = groups[vector[Vector.GROUP]]
        numel = vector[Vector.STOP] - vector[Vector.START]
        moment = floats(vector[Vector.MOMENT] + 4 * vector[Vector.START], numel)
        remainders, scales = vector[Vector.REMAINDER], vector[Vector.EXP_AVG_SCALE]
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
        key = storage.step_key(vector[Vector.KEY], group[Group.STEP])
        for offset in range(0, numel, _block(grads)):
            count = min(_block(grads), numel - offset)
            grad = _gradient(vector, offset, count, grads)
            exp_avg = _momentum(vector, offset, count, momenta)
            param = storage.weights(vector[Vector.PARAM], remainders, offset, count, weights)
            for i in range(count):
                update = grad[i] * (ONE / math.sqrt(moment[offset + i])) * inverse_divisor
                momentum = beta1 * exp_avg[i] + rest * update
                exp_avg[i] = momentum
                weight = param[i]
                weight -= decay * weight
                param[i] = weight - lr * momentum
            if vector[Vector.EXP_AVG_IS_BF16] or scales:
                bits = all_bits[:count]
                _draw(vector, key, offset, bits)
                address, is_bf16 = vector[Vector.EXP_AVG], vector[Vector.EXP_AVG_IS_BF16]
                storage.keep_momentum(address, is_bf16, scales, offset, exp_avg, bits)
            storage.keep_weights(vector[Vector.PARAM], remainders, offset, param)
            storage.copy_to_model(vector[Vector.MODEL_WEIGHT], offset, param)
