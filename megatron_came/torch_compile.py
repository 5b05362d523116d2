"""How ``torch.compile`` goes around a step."""

import functools
from typing import Any

import torch

_WHY = (
    "CAME's step runs in kernels of its own: compile the model alone, or leave out fullgraph=True"
)


@functools.cache
def keep_out_of_compiler(optimizer: Any) -> None:
    """Let ``torch.compile`` leave a class's ``_step`` as it is, wherever it is called.

    A step writes its sums through views of one buffer, float64 scalars among them. The compiler
    takes a float64 scalar on the CPU that comes from outside for a Python number, and what is
    written to it is lost: the sum of u^2 stayed 0, so that no update was clipped. Kernels work on
    addresses, of which a tracer knows nothing. It is called when the first optimizer is made: it
    takes long to import.
    """
    disable: Any = torch.compiler.disable
    try:
        optimizer._step = disable(optimizer._step, reason=_WHY)
    except TypeError:  # older PyTorch gives no reasons
        optimizer._step = disable(optimizer._step)
