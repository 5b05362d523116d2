"""Reads and writes gradients, momentum and weights as memory holds them; arithmetic is fp32.

Gradients are fp32 or bf16, momentum fp32, bf16 or int8, weights fp32 or in two halves: for matrices
known when a kernel is compiled, for vectors when it runs. What is rounded is rounded as
``megatron_came.core`` rounds it. Elements are given by the place of a first one in the slice and
offsets from there, so that an address takes one instruction for four elements.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import tables
from megatron_came.kernels.triton.compiling import (
    HIGH_FACTOR,
    MIX_FACTOR,
    MIX_FACTOR_2,
    STEP_FACTOR,
    floats,
    over_lines,
)


@triton.jit
def _pointer(address, place, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Point to an element of a slice; if ALIGNED, four from there are read at once."""
    pointer = address.to(tl.pointer_type(DTYPE)) + place
    if ALIGNED:  # here, because a hint on the result of a call is lost
        pointer = tl.multiple_of(pointer, DTYPE.primitive_bitwidth // 2)
    return pointer


@triton.jit
def read(address, is_bf16, place, offset, mask, ALIGNED: tl.constexpr):
    """Read elements of a gradient or momentum in fp32."""
    if is_bf16 != 0:
        short = _pointer(address, place, tl.bfloat16, ALIGNED)
        values = tl.load(short + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        full = _pointer(address, place, tl.float32, ALIGNED)
        values = tl.load(full + offset, mask=mask, other=0.0)
    return values


@triton.jit
def read_int8(address, place, offset, mask, ALIGNED: tl.constexpr):
    """Read elements of int8 momentum in fp32, without their scales."""
    small = _pointer(address, place, tl.int8, ALIGNED)
    return tl.load(small + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def _mix(bits):
    """Twin of ``rounding.mix``."""
    bits = (bits ^ (bits >> 16)) * MIX_FACTOR
    bits = (bits ^ (bits >> 13)) * MIX_FACTOR_2
    return bits ^ (bits >> 16)


@triton.jit
def step_key(key, group):
    """Twin of ``rounding.step_key``, of a parameter's key and its row of ``GroupField``."""
    step = tl.load(group + tables.GroupField.STEP).to(tl.int64)
    return _mix((key + STEP_FACTOR * (step + 1)).to(tl.uint32))


@triton.jit
def random_bits(origin, beyond, key):
    """Twin of ``rounding.random_bits``, as uint32.

    Of elements that are so far beyond places in the full tensor, none of them across a multiple of
    2^32 from there.
    """
    mixed = origin.to(tl.uint32) * STEP_FACTOR + (origin >> 32).to(tl.uint32) * HIGH_FACTOR + key
    return _mix(mixed + beyond.to(tl.uint32) * STEP_FACTOR) & 0xFFFF


@triton.jit
def store_momentum(
    address, scales, is_bf16, is_int8, block, is_there, place, offset, values, mask, random,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write momentum; to bf16 as ``rounding.to_bf16`` rounds, to int8 as ``int8.quantize``.

    Of int8, elements are in lines, see ``compiling.over_lines``; ``block`` and ``is_there`` are of
    shape (blocks,), the places of the scales and whether any of a block's elements is in the slice.
    """
    if is_int8 != 0:
        SHAPE: tl.constexpr = (values.shape[0] // block.shape[0], block.shape[0], values.shape[1])
        absolute = tl.where(mask, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        largest = tl.max(tl.max(tl.reshape(absolute, SHAPE), 0), 1)
        exponent = tl.maximum(((largest + 0x1FFFF) >> 23) - 6, 1)
        finite = largest < 0x7F800000
        scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
        # Of a block that becomes NaN by its scale, elements become 0.
        inverse = tl.where(finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)
        dither = random.to(tl.float32) * 2.0**-16 + 2.0**-17
        rounded = tl.floor(values * over_lines(inverse, values) + dither).to(tl.int32).to(tl.int8)
        tl.store(_pointer(address, place, tl.int8, ALIGNED) + offset, rounded, mask=mask)
        tl.store(floats(scales) + block, scale, mask=is_there)
    elif is_bf16 != 0:
        bits = values.to(tl.uint32, bitcast=True)
        # To infinity they add nothing: its lower half is 0.
        rounded = (tl.where(values == values, bits + random, bits | 0x10000) >> 16).to(tl.uint16)
        tl.store(_pointer(address, place, tl.uint16, ALIGNED) + offset, rounded, mask=mask)
    else:
        tl.store(_pointer(address, place, tl.float32, ALIGNED) + offset, values, mask=mask)


@triton.jit
def read_weights(address, remainders, has_remainder, place, offset, mask, ALIGNED: tl.constexpr):
    """Read fp32 weights, in one piece or two (``remainders.join``)."""
    if has_remainder != 0:
        upper = _pointer(address, place, tl.int16, ALIGNED)
        lower = _pointer(remainders, place, tl.int16, ALIGNED)
        high = tl.load(upper + offset, mask=mask, other=0).to(tl.int32) << 16
        low = tl.load(lower + offset, mask=mask, other=0).to(tl.int32)
        values = (high + low).to(tl.float32, bitcast=True)
    else:
        full = _pointer(address, place, tl.float32, ALIGNED)
        values = tl.load(full + offset, mask=mask, other=0.0)
    return values


@triton.jit
def store_weights(
    address, remainders, model, has_remainder, has_model, model_is_bf16, place, offset, values,
    mask, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write fp32 weights, in one piece or two (``remainders.split``), and the model's 16 bits."""
    if has_remainder != 0:
        whole = values.to(tl.int32, bitcast=True)
        whole = tl.where(values == values, whole, 0x7FC00000)
        low = (whole << 16) >> 16
        high = ((whole - low) >> 16).to(tl.int16)
        tl.store(_pointer(address, place, tl.int16, ALIGNED) + offset, high, mask=mask)
        lower = _pointer(remainders, place, tl.int16, ALIGNED)
        tl.store(lower + offset, low.to(tl.int16), mask=mask)
    else:
        tl.store(_pointer(address, place, tl.float32, ALIGNED) + offset, values, mask=mask)
    if has_model != 0:
        if model_is_bf16 != 0:
            # Rounded to nearest even by hand, since the interpreter cuts bits off.
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
            tl.store(_pointer(model, place, tl.uint16, ALIGNED) + offset, rounded, mask=mask)
        else:
            halves = _pointer(model, place, tl.float16, ALIGNED)
            tl.store(halves + offset, values.to(tl.float16), mask=mask)
