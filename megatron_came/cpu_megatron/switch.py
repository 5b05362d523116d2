"""Decides whether this process trains on the CPU, and turns that on once."""

import atexit
import os
import sys
from pathlib import Path

import torch
import torch.distributed

from megatron_came.patching import put_in_place
from megatron_came.voice import say

VARIABLE = "MEGATRON_CAME_CPU"
_DEVICES = Path("/dev")

_enabled = False


def wanted() -> bool:
    """Whether this process should train on the CPU.

    Raises:
        ValueError: ``MEGATRON_CAME_CPU`` is set to something else than 0 or 1, or is not set where
            the CPU would be taken for want of a GPU that there should be.
    """
    if _enabled:
        return True  # the stand-ins answer for torch.cuda by now, so it cannot be asked again
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE} must be 1 (train on the CPU), 0 (never) or unset (the CPU where there is "
            f"no GPU), not {choice!r}."
        )
    if choice or torch.cuda.is_available():
        return choice == "1"
    if expected := _why_a_gpu_is_expected():
        raise ValueError(
            f"{expected}, but PyTorch finds none here ({_why_no_cuda()}): repair the driver or the "
            f"installation of PyTorch, or set {VARIABLE}=1 for all ranks to train on the CPU."
        )
    return True


def _why_a_gpu_is_expected() -> str | None:
    """Say why the CPU must be asked for here: other ranks may train on GPUs, and would wait."""
    ranks, here = (os.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if here and ranks != here:
        return f"of this launch's {ranks} ranks {here} are here, and the others may be on GPUs"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    devices = [] if hidden else sorted(_DEVICES.glob("nvidia[0-9]*"))
    return f"this machine has a GPU ({devices[0]})" if devices else None


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # of whatever kind
        return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return "no device is visible"


def enable() -> bool:
    """Make Megatron train on the CPU, where that is wanted (see :func:`wanted`).

    Call it before Megatron is imported; a second call does nothing.  Rank 0 says what was
    done and which defaults Megatron's flags have now, the main ones.

    Returns:
        True if Megatron will train on the CPU, False if nothing was touched.

    Raises:
        ValueError: see :func:`wanted`.
        RuntimeError: Megatron was imported before this call.
        MegatronError: Megatron is missing, of a release that is not supported, or lacks a flag that
            has to be set.
    """
    global _enabled
    if _enabled or not wanted():
        return _enabled
    if "megatron.core" in sys.modules or "megatron.training" in sys.modules:
        raise RuntimeError(
            "megatron_came.cpu_megatron.enable() must run before megatron is imported: move the "
            "call to the top of the script."
        )
    # Imported here: a machine with a GPU needs none of it.
    from megatron_came.cpu_megatron import devices, randomness
    from megatron_came.cpu_megatron.install import REPLACEMENTS

    # What this process, its workers and Megatron's checks read.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with MEGATRON_CAME_CPU=1 a GPU stays unused
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron insists on it for tensor parallelism on the GPU that the stand-ins describe.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    devices.install()
    randomness.install()
    _enabled = True

    put_in_place(REPLACEMENTS)  # Megatron, which it imports, finds the stand-ins
    atexit.register(_leave_process_groups)
    # Two lines of 80 columns at most: Megatron's own list of arguments shows all of them.
    reason = f"{VARIABLE}=1" if os.environ.get(VARIABLE) == "1" else "no GPU"
    say(
        f"training on the CPU over gloo ({reason}), unfused,\n"
        "by default --transformer-impl local --attention-backend unfused --num-workers 0."
    )
    return True


def _leave_process_groups() -> None:
    """End gloo's threads in order: Megatron leaves them to the end of the process.

    There they now and then abort it, and after an error may wait for what no rank will send.
    """
    if not torch.distributed.is_initialized():
        return
    if getattr(sys, "last_value", None) is not None:  # the exception that ends this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    torch.distributed.destroy_process_group()
