"""Who computes a step, and digests: Triton on GPUs, Numba on CPUs, plain PyTorch for all else."""

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from megatron_came.core.digests import Adder, PlacedBox, add_up, terms
from megatron_came.kernels.backend import Backend
from megatron_came.kernels.cpu import threads  # imported at once: it remembers the process
from megatron_came.kernels.eager import EagerBackend

CHOICES = ("auto", "plain", "numba", "triton")

_INSTALL = {"numba": "pip install 'megatron-came[cpu]'", "triton": "pip install triton"}


class Choice(NamedTuple):
    """Who computes a step on one device."""

    backend: Backend
    reason: str  # one sentence
    should_warn: bool = False  # a faster backend, or one that starts sooner, is not usable


def left_to_plain(reasons: Sequence[str], total: int) -> str:
    """Return a sentence about parameters, of so many, that kernels leave to plain PyTorch.

    The reasons are those of :meth:`Backend.unsupported`, one of each that is left.
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
    name = str(usual if wanted == "auto" else wanted)
    if name != usual and not (name == "triton" and interpreted):
        raise ValueError(
            f"CAME: kernels {wanted!r} do not run on {device.type}: use 'auto' or 'plain'."
        )
    try:
        return _compiled(name, device, cuda_graph)
    except Exception as error:  # not installed, or not working here, for whatever reason
        reason = _why_not(error)
        command = getattr(error, "remedy", _INSTALL[name])
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
    """Decide who computes what lies on the CPU while the model is elsewhere."""
    # "triton" is for the model's device.
    return choose("auto" if wanted == "triton" else wanted, torch.device("cpu"))


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "megatron_came":  # a fault of this package is no missing one
            return f"the package {package} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [f"its import ends in {type(error).__name__}"])[0].rstrip(".")


def _compiled(name: str, device: torch.device, cuda_graph: bool) -> Choice:
    if name == "numba":
        importlib.import_module("numba")  # first: otherwise its llvmlite would be named as missing
        from megatron_came.kernels.cpu.launch import NumbaBackend

        why = "the weights are on a CPU, and Numba is installed"
        note = " All is done on one thread: this process was forked from one that had loaded CAME."
        note = note if threads.is_forked() else ""
        return Choice(NumbaBackend(), f"CAME's step runs in Numba's kernels ({why}).{note}")
    from megatron_came.kernels.triton import probe
    from megatron_came.kernels.triton.passes import TritonBackend

    if device.type == "cuda":
        probe.check(device)
    why = f"the weights are on {device}, and Triton is installed"
    backend = TritonBackend(device, replays=cuda_graph)
    return Choice(backend, f"CAME's step runs in Triton's kernels ({why}).")


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
