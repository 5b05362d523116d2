"""Stochastic rounding to bf16, by random bits that depend on nothing but what is rounded.

The bits are a function of a key (of seed, parameter and step) and of the element's offset in the
full tensor. So every layout, and every run that resumes, draws the same bits.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Of MurmurHash3's finalizer.
MIX_FACTORS = 0x85EBCA6B, 0xC2B2AE35
# Odd, so that neighbouring steps and offsets are far apart: 2^32 over the golden ratio; and one of
# xxHash's primes, for the upper halves of offsets.
STEP_FACTOR, HIGH_FACTOR = 0x9E3779B1, 0x27D4EB2F


def mix[Bits: (int, Tensor)](value: Bits) -> Bits:
    """Return 32 bits, each of which depends on all 32 given (MurmurHash3's finalizer)."""
    first, second = MIX_FACTORS
    value = value & _MASK
    value = ((value ^ (value >> 16)) * first) & _MASK
    value = ((value ^ (value >> 13)) * second) & _MASK
    return value ^ (value >> 16)


def parameter_key(seed: int, name: str) -> int:
    """Return the 32-bit key of a parameter, whose name is the same in every layout, in a run."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def step_key(key: int, step: int) -> int:
    """Return the key of a parameter at one step."""
    return mix(key + STEP_FACTOR * (step + 1))


def random_bits(offsets: Tensor, key: int) -> Tensor:
    """Return 16 random bits for each offset in the flattened full tensor: int64, in [0, 65536).

    ``key`` is that of parameter and step.
    """
    high = (offsets >> 32) * HIGH_FACTOR
    return mix(offsets * STEP_FACTOR + high + key) & 0xFFFF


def to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to one of the two bf16 beside it, in expectation to itself: :func:`random_bits`.

    Infinity and NaN stay what they are.
    """
    whole = values.view(torch.int32).to(torch.int64) & _MASK
    rounded = torch.where(values.isfinite(), whole + bits, whole | (values.isnan() * 0x10000))
    return (rounded >> 16).to(torch.uint16).view(torch.bfloat16)
