"""How ``torch.compile`` goes around a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_WHY = (
    "CAME's step runs in kernels of its own: compile the model alone, or leave out fullgraph=True"
)


def outside_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that ``torch.compile`` leaves as it is, wherever it is called.

    A step writes its sums through views of one buffer, float64 scalars among them. The compiler
    takes a float64 scalar on the CPU that comes from outside for a Python number, and what is
    written to it is lost: the sum of u^2 stayed 0, so that no update was clipped. Kernels work on
    addresses, of which a tracer knows nothing.
    """
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
    try:
        return disable(function, reason=_WHY)
    except TypeError:  # older PyTorch gives no reasons
        return disable(function)


@functools.cache
def keep_out_of_compiler(optimizer: Any) -> None:
    """Do so with an optimizer's ``_step``, when the first one is made: it takes long to import."""
    optimizer._step = outside_compiler(optimizer._step)
