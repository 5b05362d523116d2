"""Momentum in int8: along the flat slice, blocks of 256 elements share a scale.

A scale is the least power of two with which the largest element of its block fits into [-127,
127]. So an element is exactly q times the scale, which bf16 can hold (checkpoints do), and what
has been rounded once is not changed by being rounded again.
"""

import torch
from torch import Tensor

BLOCK = 256
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
# Rounds the exponent up where the mantissa is beyond 127/64, the largest that fits.
_CARRY = 0x1FFFF


def blocks(numel: int) -> int:
    """Return how many blocks a slice of so many elements has; the last may be shorter."""
    return -(-numel // BLOCK)


def quantize(values: Tensor, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round fp32 to int8, stochastically if random bits are given, otherwise to nearest.

    The error is below a scale, or half of one: 1/63.5 or 1/127 of the block's largest element at
    most. A block with an infinity or NaN becomes NaN as a whole.

    Args:
        values: flat, fp32, from the beginning of a block.
        bits: of each element, int64; see :func:`megatron_came.core.rounding.random_bits`.

    Returns:
        (n,) int8, and the scales of the blocks, (blocks,) fp32.
    """
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    # As integers, absolute values are in order, and NaN is largest.
    largest = (padded.view(torch.int32) & 0x7FFFFFFF).amax(1)
    exponent = ((largest + _CARRY) >> 23) - 6
    scale = exponent.clamp(min=1) << 23
    scale = torch.where(largest < _INFINITY, scale, _NAN).to(torch.int32).view(torch.float32)
    scaled = (padded * scale.reciprocal().unsqueeze(1)).view(-1)[: values.numel()]
    dither = 0.5 if bits is None else (bits.to(torch.float32) + 0.5) * 2.0**-16
    return torch.floor(scaled + dither).nan_to_num(0.0).to(torch.int8), scale


def dequantize(quantized: Tensor, scale: Tensor, start: int = 0) -> Tensor:
    """Return the fp32 values of int8 ones, of the same shape.

    They begin at ``start`` of a slice, all of whose blocks have these scales, (blocks,).
    """
    places = torch.arange(start, start + quantized.numel(), device=quantized.device)
    values = quantized.reshape(-1).to(torch.float32) * scale[places // BLOCK]
    return values.view(quantized.shape)
