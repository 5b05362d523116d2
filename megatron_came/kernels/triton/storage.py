"""Reads and writes gradients, momentum and weights as memory holds them; arithmetic is fp32.

Gradients are fp32 or bf16, momentum fp32, bf16 or int8, weights fp32 or in two halves. What is
rounded is rounded as ``megatron_came.core`` rounds it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from megatron_came.kernels.triton import tables
from megatron_came.kernels.triton.compiling import (
    HIGH_FACTOR,
    INT8_BLOCK,
    MIX_FACTOR,
    MIX_FACTOR_2,
    STEP_FACTOR,
    aligned_floats,
    floats,
)


@triton.jit
def read(address, is_bf16, index, mask, ALIGNED: tl.constexpr):
    """Read elements of a gradient or momentum in fp32."""
    if is_bf16 != 0:
        short = address.to(tl.pointer_type(tl.bfloat16))
        if ALIGNED:
            short = tl.multiple_of(short, 8)
        values = tl.load(short + index, mask=mask, other=0.0).to(tl.float32)
    else:
        full = aligned_floats(address, ALIGNED)
        values = tl.load(full + index, mask=mask, other=0.0)
    return values


@triton.jit
def store_short(address, is_bf16, index, values, mask, ALIGNED: tl.constexpr):
    """Write 16-bit model weights, rounded to nearest even."""
    if is_bf16 != 0:
        # Rounded by hand, since the interpreter cuts bits off.
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values == values, rounded, 0x7FC0)
        brains = address.to(tl.pointer_type(tl.uint16))
        if ALIGNED:
            brains = tl.multiple_of(brains, 8)
        tl.store(brains + index, rounded.to(tl.uint16), mask=mask)
    else:
        halves = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            halves = tl.multiple_of(halves, 8)
        tl.store(halves + index, values.to(tl.float16), mask=mask)


@triton.jit
def momenta(address, is_bf16, scales, index, mask, ALIGNED: tl.constexpr):
    """Read elements of the momentum in fp32."""
    if scales != 0:
        small = tl.load(address.to(tl.pointer_type(tl.int8)) + index, mask=mask, other=0)
        scale = tl.load(floats(scales) + index // INT8_BLOCK, mask=mask, other=0.0)
        values = small.to(tl.float32) * scale
    else:
        values = read(address, is_bf16, index, mask, ALIGNED)
    return values


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
def _random_bits(place, key):
    """Twin of ``rounding.random_bits``, as uint32."""
    mixed = place.to(tl.uint32) * STEP_FACTOR + (place >> 32).to(tl.uint32) * HIGH_FACTOR
    mixed += key
    return _mix(mixed) & 0xFFFF


@triton.jit
def store_momentum(address, is_bf16, index, values, mask, place, key, ALIGNED: tl.constexpr):
    """Write momentum; to bf16 as ``rounding.to_bf16`` rounds."""
    if is_bf16 != 0:
        bits = values.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        special = tl.where((bits & 0x7FFFFF) != 0, bits | 0x10000, bits)
        rounded = tl.where(finite, bits + _random_bits(place, key), special) >> 16
        brains = address.to(tl.pointer_type(tl.uint16))
        if ALIGNED:
            brains = tl.multiple_of(brains, 8)
        tl.store(brains + index, rounded.to(tl.uint16), mask=mask)
    else:
        tl.store(aligned_floats(address, ALIGNED) + index, values, mask=mask)


@triton.jit
def store_int8(address, scales, block, index, values, mask, place, key):
    """Write momentum as ``int8.quantize`` rounds.

    Args:
        address: of the momentum.
        scales: address of its scales.
        block: (blocks,), places of the blocks' scales.
        index: (blocks, 256), places of the elements.
        values: likewise, fp32.
        mask: likewise.
        place: likewise, in the full tensor.
        key: of the random bits.
    """
    absolute = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.where(mask, absolute, 0), 1)
    exponent = tl.maximum(((largest + 0x1FFFF) >> 23) - 6, 1)
    finite = largest < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    dither = (_random_bits(place, key).to(tl.float32) + 0.5) * 0.0000152587890625
    rounded = tl.floor(values * inverse[:, None] + dither)
    rounded = tl.where(finite[:, None], rounded, 0.0).to(tl.int32).to(tl.int8)
    tl.store(address.to(tl.pointer_type(tl.int8)) + index, rounded, mask=mask)
    tl.store(floats(scales) + block, scale, mask=tl.max(mask.to(tl.int32), 1) != 0)


@triton.jit
def weights(address, remainders, index, mask, ALIGNED: tl.constexpr):
    """Read fp32 weights, in one piece or two (``remainders.join``)."""
    if remainders != 0:
        upper = address.to(tl.pointer_type(tl.int16))
        lower = remainders.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            upper = tl.multiple_of(upper, 8)
            lower = tl.multiple_of(lower, 8)
        high = tl.load(upper + index, mask=mask, other=0).to(tl.int32) << 16
        low = tl.load(lower + index, mask=mask, other=0).to(tl.int32)
        values = (high + low).to(tl.float32, bitcast=True)
    else:
        values = tl.load(aligned_floats(address, ALIGNED) + index, mask=mask, other=0.0)
    return values


@triton.jit
def store_weights(address, remainders, index, values, mask, ALIGNED: tl.constexpr):
    """Write fp32 weights, in one piece or two (``remainders.split``)."""
    if remainders != 0:
        upper = address.to(tl.pointer_type(tl.int16))
        lower = remainders.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            upper = tl.multiple_of(upper, 8)
            lower = tl.multiple_of(lower, 8)
        whole = values.to(tl.int32, bitcast=True)
        whole = tl.where(values == values, whole, 0x7FC00000)
        low = (whole << 16) >> 16
        tl.store(upper + index, ((whole - low) >> 16).to(tl.int16), mask=mask)
        tl.store(lower + index, low.to(tl.int16), mask=mask)
    else:
        tl.store(aligned_floats(address, ALIGNED) + index, values, mask=mask)
