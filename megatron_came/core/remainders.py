"""Fp32 weights as bf16 weights and the 16 bits that these lack.

As integers, fp32 = 65536 bf16 + remainder with a remainder in [-32768, 32767]. So the bf16 weight
is the nearest one, but that of two equally near ones it is the one farther from zero and not the
even one; and every fp32 value comes back bit for bit. NaN comes back as one NaN, whatever its bits.
"""

import torch
from torch import Tensor

_NAN = 0x7FC00000


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 weights and the int16 remainders of fp32 weights, of the same shape."""
    whole = values.contiguous().view(torch.int32)
    whole = torch.where(values.isnan(), _NAN, whole)  # some would carry into the sign
    remainder = whole.to(torch.int16)  # keeps the low 16 bits
    high = (whole - remainder) >> 16
    return high.to(torch.int16).view(torch.bfloat16), remainder


def join(weights: Tensor, remainders: Tensor) -> Tensor:
    """Return the fp32 weights that :func:`split` was given."""
    high = weights.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + remainders).view(torch.float32)
