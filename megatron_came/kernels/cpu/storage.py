"""Reads and writes gradients, momentum and weights as memory holds them; arithmetic is fp32.

Gradients are fp32 or bf16, momentum fp32, bf16 or int8, weights fp32 or in two halves. What is
rounded is rounded as ``megatron_came.core`` rounds it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

import math

import numpy as np
from numba import carray

from megatron_came.core.int8 import BLOCK as INT8_BLOCK
from megatron_came.kernels.cpu.compiling import (
    elementwise,
    floats,
    inline,
    shorts,
    to_int8,
    to_int16,
)
from megatron_came.kernels.triton.tables import MatrixField as Matrix


@elementwise
def read_bf16(bits, out):
    """Widen bf16 numbers, given by their bits, to fp32."""
    whole = out.view(np.uint32)
    for i in range(bits.size):
        whole[i] = np.uint32(bits[i]) << np.uint32(16)


@inline
def _rows(address, is_bf16, offset, stride, rows, count, buffer):
    """Rows of a gradient or momentum in fp32: in their own memory, or in the buffer.

    Args:
        address: of the tensor.
        is_bf16: whether it is bf16, otherwise fp32.
        offset: of the first row's first element.
        stride: elements from there to the next row's.
        rows: how many.
        count: elements of each.
        buffer: fp32.

    Returns:
        Address of the first row, elements from there to the next.
    """
    if not is_bf16:
        return address + 4 * offset, stride
    out = np.int64(buffer.ctypes.data)
    for row in range(rows):
        bits = shorts(address + 2 * (offset + row * stride), count)
        read_bf16(bits, floats(out + 4 * row * count, count))
    return out, count


@inline
def gradients(param, offset, stride, rows, count, buffer):
    """Rows of a gradient; see :func:`_rows`."""
    address, is_bf16 = param[Matrix.GRAD], param[Matrix.GRAD_IS_BF16]
    return _rows(address, is_bf16, offset, stride, rows, count, buffer)


@elementwise
def _scale_int8(small, scale, out):
    for i in range(small.size):
        out[i] = np.float32(small[i]) * scale


@inline
def read_int8(address, scales, offset, count, out):
    """Elements [offset, offset + count) of int8 momentum."""
    done = 0
    while done < count:
        block = (offset + done) // INT8_BLOCK
        size = min((block + 1) * INT8_BLOCK - offset, count) - done
        small = carray(to_int8(address + offset + done), (size,))
        _scale_int8(small, floats(scales + 4 * block, 1)[0], out[done : done + size])
        done += size


@inline
def momenta(param, offset, stride, rows, count, buffer):
    """Rows of a momentum; see :func:`_rows`."""
    address, scales = param[Matrix.EXP_AVG], param[Matrix.EXP_AVG_SCALE]
    if not scales:
        is_bf16 = param[Matrix.EXP_AVG_IS_BF16]
        return _rows(address, is_bf16, offset, stride, rows, count, buffer)
    out = np.int64(buffer.ctypes.data)
    for row in range(rows):
        into = floats(out + 4 * row * count, count)
        read_int8(address, scales, offset + row * stride, count, into)
    return out, count


@inline
def gradient(param, offset, count, buffer):
    """Part of a row of a gradient in fp32."""
    return floats(gradients(param, offset, count, 1, count, buffer)[0], count)


@inline
def momentum(param, offset, count, buffer):
    """Part of a row of a momentum in fp32."""
    return floats(momenta(param, offset, count, 1, count, buffer)[0], count)


@elementwise
def _draw_some(first_place, offset, bits):
    for i in range(bits.size):
        mixed = np.uint32(np.uint32(first_place + i) * np.uint32(0x9E3779B1) + offset)
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        bits[i] = np.uint16(mixed ^ (mixed >> np.uint32(16)))


@inline
def step_key(param_key, step):
    """Twin of ``rounding.step_key``."""
    key = np.uint32(np.int64(param_key) + np.int64(0x9E3779B1) * (np.int64(step) + 1))
    key = np.uint32((key ^ (key >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    key = np.uint32((key ^ (key >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(key ^ (key >> np.uint32(16)))


@inline
def draw(first_place, key, bits):
    """Twin of ``rounding.random_bits`` for consecutive places."""
    done = 0
    while done < bits.size:  # once, but where the upper half of the place changes
        high = (first_place + done) >> 32
        stop = min(((high + 1) << 32) - first_place, bits.size)
        offset = np.uint32(high * 0x27D4EB2F + key)
        _draw_some(first_place + done, offset, bits[done:stop])
        done = stop


@elementwise
def _round_to_bf16(values, bits, kept):
    """Twin of ``rounding.to_bf16``."""
    whole = values.view(np.uint32)
    for i in range(values.size):
        word = whole[i]
        quiet = np.uint32(0x10000) if values[i] != values[i] else np.uint32(0)
        finite = (word & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        rounded = np.uint32(word + np.uint32(bits[i])) if finite else np.uint32(word | quiet)
        kept[i] = np.uint16(rounded >> np.uint32(16))


@elementwise
def _round_block_to_int8(values, bits, kept):
    """Twin of ``int8.quantize`` for a block; returns its scale."""
    whole = values.view(np.int32)
    largest = np.int32(0)
    for i in range(values.size):
        largest = max(largest, whole[i] & np.int32(0x7FFFFFFF))
    if largest >= 0x7F800000:
        kept[:] = 0
        return np.float32(np.nan)
    exponent = ((int(largest) + 0x1FFFF) >> 23) - 6
    exponent = max(exponent, 1) - 127
    inverse = np.float32(math.ldexp(1.0, -exponent))
    for i in range(values.size):
        dither = (np.float32(bits[i]) + np.float32(0.5)) * np.float32(2.0**-16)
        exact = values[i] * inverse + dither
        cut = np.int32(exact)  # towards zero
        kept[i] = np.int8(cut - np.int32(np.float32(cut) > exact))
    return np.float32(math.ldexp(1.0, exponent))


@inline
def keep_momentum(address, is_bf16, scales, offset, values, bits):
    """Round momentum to where it is kept, if that is not its own memory; int8 by whole blocks."""
    count = values.size
    if is_bf16:
        _round_to_bf16(values, bits, shorts(address + 2 * offset, count))
    if scales:
        for first in range(0, count, INT8_BLOCK):
            stop = min(first + INT8_BLOCK, count)
            kept = carray(to_int8(address + offset + first), (stop - first,))
            scale = _round_block_to_int8(values[first:stop], bits[first:stop], kept)
            floats(scales + 4 * ((offset + first) // INT8_BLOCK), 1)[0] = scale


@elementwise
def _join(high, low, out):
    """Twin of ``remainders.join``."""
    whole = out.view(np.int32)
    for i in range(out.size):
        whole[i] = (np.int32(high[i]) << np.int32(16)) + np.int32(low[i])


@elementwise
def _split(values, high, low):
    """Twin of ``remainders.split``."""
    bits = values.view(np.int32)
    for i in range(values.size):
        whole = bits[i] if values[i] == values[i] else np.int32(0x7FC00000)
        rest = np.int16(whole)
        low[i] = rest
        high[i] = (whole - np.int32(rest)) >> np.int32(16)


@inline
def weights(address, remainders, offset, count, buffer):
    """Fp32 weights: their own memory, or the buffer."""
    if not remainders:
        return floats(address + 4 * offset, count)
    out = buffer[:count]
    high = carray(to_int16(address + 2 * offset), (count,))
    _join(high, carray(to_int16(remainders + 2 * offset), (count,)), out)
    return out


@inline
def keep_weights(address, remainders, offset, values):
    """Split weights to where they are kept, if that is not their own memory."""
    if remainders:
        high = carray(to_int16(address + 2 * offset), (values.size,))
        _split(values, high, carray(to_int16(remainders + 2 * offset), (values.size,)))


@elementwise
def _write_bf16(values, bits):
    """Round to nearest even; NaN stays NaN."""
    whole = values.view(np.uint32)
    for i in range(values.size):
        odd = (whole[i] >> np.uint32(16)) & np.uint32(1)
        rounded = (whole[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        bits[i] = np.uint32(0x7FC0) if values[i] != values[i] else rounded


@inline
def copy_to_model(address, offset, values):
    """Write the 16-bit model weights, if there are any."""
    if address:
        _write_bf16(values, shorts(address + 2 * offset, values.size))
