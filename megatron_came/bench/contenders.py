"""The optimizers that are timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.shard import Shard
from megatron_came.optimizer import CAME

_LR = 1e-5


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer and what its step must move at least.

    Attributes:
        name: as printed.
        build: from parameters and their shards to an optimizer.
        floor: bytes a parameter that a step reads and writes at least; None where nobody has
            counted.
        cached_floor: likewise, of a matrix whose gradient and momentum stay in the cache.
        sharded: whether it can update slices of tensors.
    """

    name: str
    build: Callable[[list[Tensor], Mapping[Tensor, Shard]], torch.optim.Optimizer]
    floor: int | None = None
    cached_floor: int | None = None
    sharded: bool = False


def _came(
    kernels: str, momentum: torch.dtype = torch.float32
) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, shards: CAME(
        params,
        lr=_LR,
        shards=shards,
        kernels=kernels,
        momentum_dtype=momentum,
        names={param: str(index) for index, param in enumerate(params)},
    )


def _plain(make: Callable[..., Any]) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, shards: make(params, lr=_LR)


def _imported(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def contenders(device: torch.device) -> list[Contender]:
    """Return those that are installed and run on the device."""
    fused = "triton" if device.type == "cuda" else "numba"
    found = [
        Contender("CAME, fused", _came(fused), 32, 20, sharded=True),
        Contender("CAME, bf16 momentum", _came(fused, torch.bfloat16), 26, 16, sharded=True),
        Contender("CAME, int8 momentum", _came(fused, torch.int8), 23, 14, sharded=True),
        Contender("CAME, plain", _came("plain"), 32, sharded=True),
        Contender("torch AdamW, fused", _plain(partial(torch.optim.AdamW, fused=True)), 28),
        Contender("torch AdamW, foreach", _plain(partial(torch.optim.AdamW, foreach=True)), 28),
        Contender("torch Adafactor", _plain(torch.optim.Adafactor)),
    ]
    optional = [("came_pytorch", "came_pytorch", "CAME", None)]
    if device.type == "cuda":
        optional += [
            ("apex FusedAdam", "apex.optimizers", "FusedAdam", 28),  # type: ignore[list-item]
            ("TE FusedAdam", "transformer_engine.pytorch.optimizers", "FusedAdam", 28),  # type: ignore[list-item]
        ]
    for name, module, attribute, floor in optional:
        try:
            found.append(Contender(name, _plain(_imported(module, attribute)), floor))
        except (ImportError, AttributeError):
            continue
    return found
