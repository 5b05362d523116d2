"""Stochastic rounding to bf16, by random bits that depend on nothing but what is rounded.

The bits are a function of a key (of seed, parameter and step) and of the element's place in the
full tensor. So every layout, and every run that resumes, draws the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(value: int) -> int:
    """Return 32 bits, each of which depends on all 32 given (MurmurHash3's finalizer)."""
    value &= _MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def parameter_key(seed: int, name: str) -> int:
    """Return the 32-bit key of a parameter.

    Args:
        seed: of the run.
        name: the same in every layout.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def step_key(key: int, step: int) -> int:
    """Return the key of a parameter at one step."""
    return mix(key + 0x9E3779B1 * (step + 1))


def random_bits(places: Tensor, key: int) -> Tensor:
    """Return 16 random bits for each place: int64, in [0, 65536).

    Args:
        places: flat places in the full tensor, int64.
        key: of parameter and step.
    """
    high = (places >> 32) * 0x27D4EB2F
    value = (places * 0x9E3779B1 + high + key) & _MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return (value ^ (value >> 16)) & 0xFFFF


def to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to one of the two bf16 beside it, in expectation to itself.

    Infinity and NaN stay what they are.

    Args:
        values: fp32.
        bits: see :func:`random_bits`.
    """
    whole = values.view(torch.int32).to(torch.int64) & _MASK
    rounded = torch.where(values.isfinite(), whole + bits, whole | (values.isnan() * 0x10000))
    return (rounded >> 16).to(torch.uint16).view(torch.bfloat16)
