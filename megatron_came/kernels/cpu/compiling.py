"""How functions are compiled, and views of memory at an address."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator,attr-defined"

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic

from megatron_came.core import factors

# What ``task.compiled``'s function calls becomes part of it. A function of its own is found by name
# in whatever machine code was loaded first, and is not the same compiled anew and from the cache:
# results would differ in the last bits.
_inlined = partial(njit, error_model="numpy", forceinline=True)
inline = _inlined()
# Sums may be reordered, but NaN and infinity keep their meaning.
fast = _inlined(fastmath={"reassoc", "contract", "nsz"})
elementwise = _inlined(fastmath={"contract"})

ONE = np.float32(1.0)
SQUARE_SCALE = np.float32(2.0**-10)  # see megatron_came.core.passes
SQUARE_UNSCALE = 2.0**20
UPDATE_SCALE = np.float32(2.0**-16)
UPDATE_UNSCALE = 2.0**32
# See megatron_came.core.factors.
LARGEST_MEAN = factors.largest_mean(torch.float32)
LEAST_RATIO = np.float32(factors.LEAST_RATIO)
BAD_GUESS = factors.BAD_GUESS


def _pointer(dtype):
    """Return an intrinsic that turns an address into a pointer."""

    @intrinsic
    def pointer(_context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(address), generate

    return pointer


to_float32 = _pointer(types.float32)
to_float64 = _pointer(types.float64)
to_int64 = _pointer(types.int64)
to_uint16 = _pointer(types.uint16)
to_int16 = _pointer(types.int16)
to_int32 = _pointer(types.int32)
to_int8 = _pointer(types.int8)


@inline
def floats(address, count):
    """View fp32 numbers at an address."""
    return carray(to_float32(address), (count,))


@inline
def doubles(address, count):
    """View float64 numbers at an address."""
    return carray(to_float64(address), (count,))


@inline
def shorts(address, count):
    """View 16-bit numbers at an address."""
    return carray(to_uint16(address), (count,))


@inline
def at_most(value, high):
    """``torch.clamp(max=high)``: NaN stays NaN."""
    return high if value > high else value


@inline
def at_least(value, low):
    """``torch.clamp(min=low)``: NaN stays NaN."""
    return low if value < low else value
