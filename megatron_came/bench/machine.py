"""What a result was measured on."""

import importlib.metadata
import platform
from pathlib import Path

import torch

from megatron_came._version import __version__

_PACKAGES = ("torch", "triton", "numba", "megatron-core", "came-pytorch")


def describe(device: torch.device) -> dict[str, str | int]:
    """Return hardware and versions."""
    machine: dict[str, str | int] = {
        "device": _name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "megatron_came": __version__,
    }
    for package in _PACKAGES:
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return machine


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()  # without Linux's /proc
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
