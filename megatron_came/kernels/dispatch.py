"""Who computes a step: Triton on GPUs, Numba on CPUs, plain PyTorch for all else."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_came.kernels.backend import Backend
from megatron_came.kernels.cpu import threads  # imported at once: it remembers the process
from megatron_came.kernels.eager import EagerBackend

CHOICES = ("auto", "plain", "numba", "triton")

_INSTALL = {"numba": "pip install 'megatron-came[cpu]'", "triton": "pip install triton"}


class Choice(NamedTuple):
    """Who computes a step on one device.

    Attributes:
        backend: that computes.
        reason: one sentence.
        should_warn: whether a faster backend, or one that starts sooner, is not usable.
    """

    backend: Backend
    reason: str
    should_warn: bool = False


def left_to_plain(reasons: Sequence[str], total: int) -> str:
    """Return a sentence about parameters that kernels leave to plain PyTorch.

    Args:
        reasons: of each of them, see :meth:`Backend.unsupported`.
        total: number of all parameters.
    """
    counts = [f"{count} {reason}" for reason, count in Counter(reasons).most_common()]
    return (
        f"CAME's step runs in plain PyTorch, which is slower, for {len(reasons)} of {total} "
        f"parameters: {', '.join(counts)}."
    )


def choose(wanted: str, device: torch.device, *, cuda_graph: bool = False) -> Choice:
    """Decide who computes the parameters of a device.

    Args:
        wanted: one of ``CHOICES``; "auto" is the fastest that is installed.
        device: where they lie.
        cuda_graph: whether to replay launches, which Triton's kernels can alone.

    Raises:
        ValueError: what is wanted does not exist, is not installed, or does not run there.
    """
    if wanted not in CHOICES:
        raise ValueError(f"CAME: kernels {wanted!r} is not one of {', '.join(CHOICES)}.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if cuda_graph:
        if wanted not in ("auto", "triton") or (device.type != "cuda" and not interpreted):
            raise ValueError(
                f"CAME: cuda_graph=True is for Triton's kernels on a GPU, not for kernels "
                f"{wanted!r} on {device.type}: leave it out."
            )
        wanted = "triton"
    if wanted == "plain":
        return Choice(EagerBackend(), "CAME's step runs in plain PyTorch, as asked for.")
    usual = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if wanted == "auto" and usual is None:
        return Choice(
            EagerBackend(),
            f"CAME's step runs in plain PyTorch: there are no kernels for {device.type}.",
        )
    name = usual if wanted == "auto" else wanted
    runs_there = name == usual or (name == "triton" and interpreted)
    if not runs_there:
        raise ValueError(
            f"CAME: kernels {wanted!r} do not run on {device.type}: use 'auto' or 'plain'."
        )
    try:
        return _compiled(str(name), device, cuda_graph)
    except Exception as error:  # not installed, or not working here, for whatever reason
        reason = _why_not(error)
        command = getattr(error, "remedy", _INSTALL[str(name)])
        if wanted != "auto":
            raise ValueError(
                f"CAME: kernels {wanted!r} need {name}, which cannot be used ({reason}): {command}."
            ) from error
        return Choice(
            EagerBackend(),
            f"CAME's step runs in plain PyTorch, which is slower: {name} cannot be used ({reason});"
            f" {command}.",
            should_warn=True,
        )


def choose_on_host(wanted: str) -> Choice:
    """Decide who computes what lies on the CPU while the model is elsewhere.

    Args:
        wanted: as for :func:`choose`; "triton" is for the model's device.
    """
    return choose("auto" if wanted == "triton" else wanted, torch.device("cpu"))


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "megatron_came":
            return f"the package {package} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [f"its import ends in {type(error).__name__}"])[0].rstrip(".")


def _compiled(name: str, device: torch.device, cuda_graph: bool) -> Choice:
    if name == "numba":
        importlib.import_module("numba")  # first: otherwise its llvmlite would be named as missing
        from megatron_came.kernels.cpu.launch import NumbaBackend

        why = "the weights are on a CPU, and Numba is installed"
        note = threads.note()
        return Choice(
            NumbaBackend(), f"CAME's step runs in Numba's kernels ({why}).{note and ' ' + note}"
        )
    from megatron_came.kernels.triton import probe
    from megatron_came.kernels.triton.passes import TritonBackend

    if device.type == "cuda":
        probe.check(device)
    why = f"the weights are on {device}, and Triton is installed"
    backend = TritonBackend(device, replays=cuda_graph)
    return Choice(backend, f"CAME's step runs in Triton's kernels ({why}).")
