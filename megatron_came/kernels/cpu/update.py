"""Pass 3: momentum and weights."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from megatron_came.core.int8 import BLOCK
from megatron_came.kernels.cpu.compiling import ONE, Kernel, elementwise, fast, inline
from megatron_came.kernels.cpu.precision import (
    NOT_FINITE,
    PLACE_FACTOR,
    exponent_of_scale,
    first_state,
    narrow,
    power_of_two,
    read_weight,
    to_nearest_bf16,
    widen,
    write_weight,
)

# Elements that are taken at once where momentum is not int8; rows are not cut.
_RANGE_ELEMENTS = 4096
_ABSOLUTE = np.int32(0x7FFFFFFF)


class Arrays(NamedTuple):
    """What a slice consists of between steps."""

    weights: Any  # fp32; or int16, the upper halves of fp32 weights
    remainders: Any  # int16, their lower halves; otherwise empty
    model_weights: Any  # bf16 copy of the weights, or empty
    momentum: Any  # fp32, bf16 or int8
    block_scales: Any  # of int8 momentum, fp32; otherwise empty


class Scales(NamedTuple):
    """Inverse roots of factors, fp32: (batch rows,) and (batch, columns)."""

    row: Any  # of r
    column: Any  # of c
    row_confidence: Any  # of R
    column_confidence: Any  # of C


class Rates(NamedTuple):
    """What all elements of a slice share in a step."""

    lr: float
    decay: float  # learning rate times weight decay
    beta1: float
    inverse_divisor: float  # 1/d
    key: int  # of random bits


@fast
def _largest(grad, momentum, column_scale, row_scale, beta1, scale, largest):
    """The largest of the new momentum's absolute values, by their bits."""
    for i in range(grad.size):
        update = widen(grad[i], ONE) * row_scale * column_scale[i]
        value = beta1 * widen(momentum[i], scale) + update
        word = np.int32(np.float32(value).view(np.int32) & _ABSOLUTE)
        largest = word if word > largest else largest
    return largest


@elementwise
def _update(
    weights, remainders, grad, momentum, column_scale, column_confidence, row_scale, step, beta1,
    decay, scale, inverse_scale, state,
):  # fmt: skip
    for i in range(grad.size):
        update = widen(grad[i], ONE) * row_scale * column_scale[i]
        value = beta1 * widen(momentum[i], scale) + update
        weight = read_weight(weights, remainders, i)
        weight -= decay * weight
        write_weight(weights, remainders, i, weight - step * (value * column_confidence[i]))
        momentum[i] = narrow(momentum[i], value, inverse_scale, state)
        state = np.uint32(state + PLACE_FACTOR)


@elementwise
def _copy(weights, remainders, model_weights):
    for i in range(model_weights.size):
        model_weights[i] = to_nearest_bf16(read_weight(weights, remainders, i))


@inline
def _clear(values):
    values[:] = 0


@inline
def _rest_of_row(geometry, row_places, low, stop):
    """Return the row at an element, its matrix and column, its place, and where all this ends."""
    row = (geometry.start + low) // geometry.columns
    column = geometry.start + low - row * geometry.columns
    place = row_places[row] + column
    # Random bits depend on the upper half of a place in their own way.
    same_half = (((place >> 32) + 1) << 32) - place
    high = min(low + min(geometry.columns - column, same_half), stop)
    return row, row // geometry.rows, column, place, high


@Kernel
def update(grad, arrays, geometry, row_places, scales, rates, threads):
    """Pass 3 over flat ranges of a slice, which for int8 are its blocks.

    The arguments are the gradient, fp32 or bf16, ``Arrays``, ``Geometry``, what
    ``shapes.row_places`` returns, ``Scales`` and ``Rates``.
    """
    weights, remainders, model_weights, momentum, block_scales = arrays
    # Tuples of arrays are taken apart here: to hand one on counts references to all of them.
    row_scale, column_scale, row_confidence, column_confidence = scales
    lr, decay, beta1 = np.float32(rates.lr), np.float32(rates.decay), np.float32(rates.beta1)
    rest = np.float32((1.0 - rates.beta1) * rates.inverse_divisor)
    key, is_int8 = np.uint32(rates.key), momentum.itemsize == 1
    size = BLOCK if is_int8 else max(_RANGE_ELEMENTS // geometry.columns, 1) * geometry.columns
    count = -(-geometry.size // size)
    for thread in prange(threads):
        for number in range(count * thread // threads, count * (thread + 1) // threads):
            begin, stop = number * size, min((number + 1) * size, geometry.size)
            scale, inverse_scale, exponent = ONE, ONE, np.int64(0)
            if is_int8:
                scale, largest, low = block_scales[number], np.int32(0), begin
                while low < stop:
                    row, matrix, column, _, high = _rest_of_row(geometry, row_places, low, stop)
                    largest = _largest(
                        grad[low:high], momentum[low:high], column_scale[matrix, column:],
                        rest * row_scale[row], beta1, scale, largest,
                    )  # fmt: skip
                    low = high
                exponent = exponent_of_scale(largest)
                inverse_scale = power_of_two(254 - min(exponent, 253))
            low = begin
            while low < stop:
                row, matrix, column, place, high = _rest_of_row(geometry, row_places, low, stop)
                _update(
                    weights[low:high], remainders[low:high], grad[low:high], momentum[low:high],
                    column_scale[matrix, column:], column_confidence[matrix, column:],
                    rest * row_scale[row], lr * row_confidence[row], beta1, decay, scale,
                    inverse_scale, first_state(place, key),
                )  # fmt: skip
                _copy(weights[low:high], remainders[low:high], model_weights[low:high])
                low = high
            if is_int8:
                block_scales[number] = power_of_two(exponent)
                if exponent == NOT_FINITE:
                    block_scales[number] = np.nan
                    _clear(momentum[begin:stop])
