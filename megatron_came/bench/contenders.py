"""The optimizers that are timed."""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.shard import Shard
from megatron_came.optimizer import CAME

_LR = 1e-5  # small: all train the same parameters, in turns


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer and what its step must move at least."""

    name: str  # as printed
    # From parameters and their shards to an optimizer.
    build: Callable[[list[Tensor], Mapping[Tensor, Shard]], torch.optim.Optimizer]
    # Bytes a parameter that a step reads and writes at least; None where nobody has counted.
    floor: int | None = None
    # Likewise, of a matrix whose gradient and momentum stay in a GPU's cache.
    cached_floor: int | None = None
    traffic: str = "adam"  # whose passes it has, "came" or "adam"; see ``floors``
    momentum: torch.dtype = torch.float32  # dtype of its momentum
    sharded: bool = False  # whether it can update slices of tensors


def _came(
    name: str,
    kernels: str,
    floor: int,
    cached_floor: int | None,
    momentum: torch.dtype = torch.float32,
) -> Contender:
    def build(params: list[Tensor], shards: Mapping[Tensor, Shard]) -> torch.optim.Optimizer:
        names = {param: str(index) for index, param in enumerate(params)}
        own: dict[str, Any] = {"kernels": kernels, "momentum_dtype": momentum, "names": names}
        return CAME(params, lr=_LR, shards=shards, **own)

    return Contender(f"CAME, {name}", build, floor, cached_floor, "came", momentum, sharded=True)


def _other(make: Callable[..., Any]) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, shards: make(params, lr=_LR)


def contenders(device: torch.device) -> list[Contender]:
    """Return those that are installed and run on the device."""
    fused = "triton" if device.type == "cuda" else "numba"
    found = [
        # Bytes: CAME's passes read g; g and m; g, m and p, and the last writes m and p, 8 x 4 in
        # fp32. What a cache still holds, g twice and m once, is not read again. AdamW reads g, p
        # and two moments, and writes all but g: 7 x 4.
        _came("fused", fused, 32, 20),
        _came("bf16 momentum", fused, 26, 16, torch.bfloat16),
        _came("int8 momentum", fused, 23, 14, torch.int8),
        _came("plain", "plain", 32, None),
        Contender("torch AdamW, fused", _other(partial(torch.optim.AdamW, fused=True)), 28),
        Contender("torch AdamW, foreach", _other(partial(torch.optim.AdamW, foreach=True)), 28),
        Contender("torch Adafactor", _other(torch.optim.Adafactor)),
    ]
    for name, module, attribute, floor, on_cpu in (
        ("came_pytorch", "came_pytorch", "CAME", None, True),
        ("apex FusedAdam", "apex.optimizers", "FusedAdam", 28, False),
        ("TE FusedAdam", "transformer_engine.pytorch.optimizers", "FusedAdam", 28, False),
    ):
        if device.type != "cuda" and not on_cpu:
            continue
        with contextlib.suppress(ImportError, AttributeError):  # not installed, or older
            make = getattr(importlib.import_module(module), attribute)
            found.append(Contender(name, _other(make), floor))
    return found
