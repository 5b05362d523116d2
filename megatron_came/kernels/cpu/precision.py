"""Numbers as memory holds them: bf16, int8 and weights in two halves, widened and rounded.

bf16 is seen as uint16, the upper halves of fp32 weights as int16. Kernels call these functions in
the loops that use the numbers, so that the arithmetic hides behind the wait for memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

import numpy as np
from numba import types
from numba.extending import overload

from megatron_came.core import rounding
from megatron_came.core.int8 import BLOCK
from megatron_came.kernels.cpu.compiling import elementwise

_EXPONENT = np.uint32(0x7F800000)  # all ones: infinity and NaN
NOT_FINITE = 255  # the biased exponent of infinity and NaN
_NAN = np.int32(0x7FC00000)
_UPPER, _LOWER = np.uint32(0xFFFF0000), np.uint32(0xFFFF)
_typed = {"fastmath": {"contract"}, "error_model": "numpy", "forceinline": True}
PLACE_FACTOR = np.uint32(rounding.STEP_FACTOR)
_HIGH_FACTOR = rounding.HIGH_FACTOR
_MIX, _MIX_2 = map(np.uint32, rounding.MIX_FACTORS)


def widen(value, scale):
    """Return an element in fp32; int8 is multiplied by the scale of its block."""


@overload(widen, **_typed)
def _widen(value, scale):
    if value == types.float32:
        return lambda value, scale: value
    if value == types.uint16:
        return lambda value, scale: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value, scale: np.float32(value) * scale


def read(values, scales, low, high, scratch):
    """Return elements [low, high) for :func:`widen`: themselves; int8 in fp32 in ``scratch``."""


@overload(read, **_typed)
def _read(values, scales, low, high, scratch):
    if values.dtype == types.int8:
        return lambda values, scales, low, high, scratch: _read_int8(
            values, scales, low, high, scratch
        )
    return lambda values, scales, low, high, scratch: values[low:high]


@elementwise
def _read_int8(values, scales, low, high, scratch):
    start = low
    while start < high:
        stop = min((start // BLOCK + 1) * BLOCK, high)
        scale, small = scales[start // BLOCK], values[start:stop]
        out = scratch[start - low : stop - low]
        for i in range(small.size):
            out[i] = np.float32(small[i]) * scale
        start = stop
    return scratch[: high - low]


# Stochastic rounding, see megatron_came.core.rounding.


@elementwise
def first_state(place, key):
    """Return what :func:`random_bits` needs of a place; each next one has ``PLACE_FACTOR`` more.

    The upper halves of such places must be the same.
    """
    high = np.uint32((place >> 32) * _HIGH_FACTOR)
    return np.uint32(np.uint32(place) * PLACE_FACTOR + high + key)


@elementwise
def random_bits(state):
    """Return 16 random bits."""
    x = np.uint32((state ^ (state >> np.uint32(16))) * _MIX)
    x = np.uint32((x ^ (x >> np.uint32(13))) * _MIX_2)
    return np.uint32((x ^ (x >> np.uint32(16))) & _LOWER)


def narrow(kept, value, inverse_scale, state):
    """Round fp32, which has been computed, to the dtype of ``kept``, with a place's random bits."""


@overload(narrow, **_typed)
def _narrow(kept, value, inverse_scale, state):
    if kept == types.float32:
        return lambda kept, value, inverse_scale, state: value
    if kept == types.uint16:
        return lambda kept, value, inverse_scale, state: _to_bf16(value, state)
    return lambda kept, value, inverse_scale, state: _to_int8(value, inverse_scale, state)


@elementwise
def _to_bf16(value, state):
    """Twin of ``rounding.to_bf16``; a NaN that has been computed shows in the upper half."""
    word = np.float32(value).view(np.uint32)
    added = random_bits(state) if (word & _EXPONENT) != _EXPONENT else np.uint32(0)
    return np.uint16(np.uint32(word + added) >> np.uint32(16))


@elementwise
def _to_int8(value, inverse_scale, state):
    """Twin of ``int8.quantize`` for an element."""
    bits = np.float32(np.int32(random_bits(state)))
    dither = bits * np.float32(2.0**-16) + np.float32(2.0**-17)
    floor = np.floor(value * inverse_scale + dither)
    # The largest may have been summed up otherwise.
    return np.int8(np.int32(min(floor, np.float32(127))))


@elementwise
def exponent_of_scale(largest):
    """Return the biased exponent of a block's scale, from the bits of its largest element."""
    if largest >= np.int32(_EXPONENT):
        return NOT_FINITE
    return max(((np.int64(largest) + 0x1FFFF) >> 23) - 6, 1)


@elementwise
def power_of_two(exponent):
    """Return the fp32 number with this biased exponent."""
    return np.uint32(exponent << 23).view(np.float32)


# Weights.


def read_weight(weights, remainders, i):
    """Return a weight in fp32; twin of ``remainders.join``."""


@overload(read_weight, **_typed)
def _read_weight(weights, remainders, i):
    if weights.dtype == types.float32:
        return lambda weights, remainders, i: weights[i]

    def join(weights, remainders, i):
        high = np.int32(np.int32(weights[i]) << np.int32(16))
        return np.int32(high + np.int32(remainders[i])).view(np.float32)

    return join


def write_weight(weights, remainders, i, value):
    """Write a weight; twin of ``remainders.split``."""


@overload(write_weight, **_typed)
def _write_weight(weights, remainders, i, value):
    if weights.dtype == types.float32:

        def write(weights, remainders, i, value):
            weights[i] = value

        return write

    def split(weights, remainders, i, value):
        whole = np.float32(value).view(np.int32) if value == value else _NAN
        rest = np.int16(whole)
        remainders[i] = rest
        weights[i] = np.int16(np.int32(whole - np.int32(rest)) >> np.int32(16))

    return split


@elementwise
def to_nearest_bf16(value):
    """Round to the nearest bf16, to the even one of two; NaN stays NaN."""
    word = np.float32(value).view(np.uint32)
    odd = np.uint32((word >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(word + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint16(np.uint32(0x7FC0) if value != value else rounded)
