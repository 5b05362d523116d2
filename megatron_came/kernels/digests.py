"""Who adds up digests: Numba on CPUs where it is installed, otherwise plain PyTorch."""

from __future__ import annotations

from functools import cache

import torch

from megatron_came.core.digests import Adder, add_up, column_keys, row_keys


@cache
def adder(device: torch.device) -> Adder:
    """Return what adds up the digests of tensors on a device."""
    if device.type != "cpu":
        return add_up
    try:
        from megatron_came.kernels.cpu.digests import add_up_fast

        bits, keys = torch.arange(-4, 5, dtype=torch.int32).view(3, 3), column_keys(0, 3)
        add_up_fast(bits, row_keys(torch.arange(3)), keys)  # compiles, or cannot
    except Exception:  # not installed, or not working here: of no consequence but the time
        return add_up
    return add_up_fast
