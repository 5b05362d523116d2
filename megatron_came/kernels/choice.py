"""Who computes a step: Triton on GPUs, Numba on CPUs, plain PyTorch for all else.

:func:`choose` picks the kernels of a device, and :func:`are_for` is the one predicate that decides
whether they or plain PyTorch update a parameter.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from megatron_came.kernels import threads  # imported at once: it remembers the process
from megatron_came.kernels.interface import Kernels
from megatron_came.work import ParameterWork

CHOICES = ("auto", "plain", "numba", "triton")


class Choice(NamedTuple):
    """Who computes a step on one device.

    Attributes:
        kernels: None for plain PyTorch.
        reason: one sentence.
        is_lesser: whether there could be kernels that are faster, but they cannot be used.
    """

    kernels: Kernels | None
    reason: str
    is_lesser: bool = False


def are_for(kernels: Kernels | None, work: ParameterWork) -> bool:
    """Decide whether kernels update a parameter; otherwise plain PyTorch does.

    They do fp32 weights, in one piece or two, in tensors that :meth:`Kernels.bears`; and vectors
    only where no other rank holds copies.
    """
    return (
        kernels is not None
        and work.has_fp32_weights
        and kernels.bears(work.param, work.shard)
        and not (work.shard.is_vector and work.copies_group is not None)
    )


def choose(wanted: str, device: torch.device) -> Choice:
    """Decide who computes the parameters of a device.

    Args:
        wanted: one of ``CHOICES``; "auto" is the fastest that is installed.
        device: where they lie.

    Raises:
        ValueError: what is wanted does not exist, is not installed, or does not run there.
    """
    if wanted not in CHOICES:
        raise ValueError(f"CAME: kernels {wanted!r} is not one of {', '.join(CHOICES)}.")
    if wanted == "plain":
        return Choice(None, "CAME's step runs in plain PyTorch, as asked for.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    usual = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if wanted == "auto" and usual is None:
        return Choice(
            None, f"CAME's step runs in plain PyTorch: there are no kernels for {device.type}."
        )
    name = usual if wanted == "auto" else wanted
    runs_there = name == usual or (name == "triton" and interpreted)
    if not runs_there:
        raise ValueError(
            f"CAME: kernels {wanted!r} do not run on {device.type}: use 'auto' or 'plain'."
        )
    try:
        return _kernels(str(name), device)
    except (ImportError, RuntimeError) as error:  # not installed, or not working here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if wanted != "auto":
            raise ValueError(
                f"CAME: kernels {wanted!r} need {name} (pip install {name}): {reason}."
            ) from error
        return Choice(
            None,
            f"CAME's step runs in plain PyTorch, which is slower: {name} cannot be used ({reason});"
            f" pip install {name}.",
            is_lesser=True,
        )


def _kernels(name: str, device: torch.device) -> Choice:
    if name == "numba":
        from megatron_came.kernels.numba.launch import NumbaKernels

        obstacle = threads.obstacle()
        limit = "" if obstacle is None else f", on one thread: {obstacle}"
        why = "the weights are on a CPU, and Numba is installed"
        return Choice(NumbaKernels(), f"CAME's step runs in Numba's kernels ({why}){limit}.")
    from megatron_came.kernels.triton.launch import TritonKernels

    why = f"the weights are on {device}, and Triton is installed"
    return Choice(TritonKernels(device), f"CAME's step runs in Triton's kernels ({why}).")
