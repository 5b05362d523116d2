"""Who adds up digests: Numba on CPUs where it is installed, otherwise plain PyTorch."""

from __future__ import annotations

from functools import cache

import torch

from megatron_came.core.digests import Adder, PlacedBox, add_up, terms


@cache
def adder(device: torch.device) -> Adder:
    """Return what adds up the digests of tensors on a device."""
    if device.type != "cpu":
        return add_up
    try:
        from megatron_came.kernels.cpu.digests import add_up_fast

        add_up_fast(terms(torch.ones(1), (1,), PlacedBox.whole((1,))))  # compiles, or cannot
    except Exception:  # not installed, or not working here: of no consequence but the time
        return add_up
    return add_up_fast
