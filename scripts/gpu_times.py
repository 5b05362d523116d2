"""Time a step on a GPU by its kernels, beside what their machine code lets expect.

The model's numbers are those of ``docs/kernels.json`` (``make kernel-report``): a pass takes the
larger of the time of its bytes, at the bandwidth of a copy that was measured here, and of its
instructions. Where the machine code of this architecture was not read, the bytes alone.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_came.bench.shapes import shapes_of
from scripts.cases.production import BF16, FP32, INT8, Setting, give, optimizer_of

FILE = Path(__file__).resolve().parents[1] / "docs" / "kernels.json"
MODEL = "gpt2-medium"
TIMED = (
    Setting(FP32, FP32, "fp32"),
    Setting(FP32, INT8, "fp32"),
    Setting(BF16, FP32, "model"),
    Setting(BF16, INT8, "remainder"),
)
# Kernels of the passes over matrices, by the beginnings of their names.
PASSES = ("square", "instability", "apply")
_STEPS = 5


@dataclass(frozen=True)
class KernelTime:
    """A kernel's time in a step, in milliseconds; of the passes over matrices the modelled one."""

    kernel: str
    launches: int
    milliseconds: float
    modelled: float | None


def bytes_of(setting: Setting) -> tuple[int, int, int]:
    """Bytes a parameter that each pass over a matrix moves."""
    grad, momentum = setting.grad.itemsize, setting.momentum.itemsize
    weights = {"fp32": 8, "model": 8 + 2, "remainder": 8}[setting.weights]
    return grad, grad + momentum, grad + 2 * momentum + weights


def modelled(
    kernel: str, setting: Setting, parameters: int, gigabytes: float, gpu: Mapping[str, float]
) -> float | None:
    """Milliseconds that a kernel should take; None where it is none of the passes' over matrices.

    Args:
        kernel: its name.
        setting: of the run.
        parameters: of matrices.
        gigabytes: a second, of a copy.
        gpu: ``sms``, ``gigahertz`` and ``instructions``, of a parameter, by kernel.
    """
    number = next((n for n, begin in enumerate(PASSES) if kernel.startswith(begin)), None)
    if number is None or "vector" in kernel:
        return None
    moving = bytes_of(setting)[number] * parameters / (gigabytes * 1e9)
    issue = gpu["sms"] * 128 * gpu["gigahertz"] * 1e9
    return 1e3 * max(moving, gpu.get(kernel, 0.0) * parameters / issue)


def machine(device: torch.device) -> dict[str, float]:
    """What is known of this GPU and of its kernels' machine code, for :func:`modelled`."""
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm_{properties.major}{properties.minor}"
    clock = getattr(properties, "clock_rate", 0) / 1e6  # not in all releases of PyTorch
    known: dict[str, float] = {"sms": properties.multi_processor_count, "gigahertz": clock or 1.8}
    for row in json.loads(FILE.read_text())["kernels"]:
        if row["architecture"] == architecture and "unaligned" not in row["variant"]:
            known.setdefault(row["kernel"], row["instructions_per_parameter"])
    return known


def kernel_times(
    events: Iterable[tuple[str, int, float]],
    steps: int,
    setting: Setting,
    parameters: int,
    gigabytes: float,
    gpu: Mapping[str, float],
) -> list[KernelTime]:
    """Sum up what the profiler saw: name, calls and microseconds of each kernel, over steps."""
    return sorted(
        (
            KernelTime(
                name,
                round(calls / steps),
                microseconds / steps / 1e3,
                modelled(name, setting, parameters, gigabytes, gpu),
            )
            for name, calls, microseconds in events
            if microseconds
        ),
        key=lambda each: -each.milliseconds,
    )


def time_setting(setting: Setting, device: torch.device, gigabytes: float) -> dict[str, object]:
    """Time steps of a model's shapes with CUDA's events, then profile some; print a table."""
    shapes = shapes_of(MODEL)
    params = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
    own, optimizer, _ = optimizer_of(params, setting, "triton")
    give(own, [param * 0.05 for param in params], setting.grad)
    del params
    for _ in range(3):
        optimizer.step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(4 * _STEPS):
        optimizer.step()
    end.record()
    torch.cuda.synchronize(device)
    step = begin.elapsed_time(end) / (4 * _STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_STEPS):
            optimizer.step()
        torch.cuda.synchronize(device)
    seen = [
        (each.key, each.count, getattr(each, "device_time_total", 0.0))
        for each in profiler.key_averages()
    ]
    matrices = sum(param.numel() for param in own if param.dim() > 1)
    times = kernel_times(seen, _STEPS, setting, matrices, gigabytes, machine(device))
    print("\n".join(["", f"{MODEL}, {setting.name}: {step:.2f} ms a step", *table(times)]))
    return {
        "setting": setting.name,
        "milliseconds": step,
        "kernels": [asdict(each) for each in times],
    }


def table(times: Iterable[KernelTime]) -> list[str]:
    """Lines of a table."""
    lines = [f"  {'kernel':<40} launches   measured   modelled (ms a step)"]
    for each in times:
        model = "" if each.modelled is None else f"{each.modelled:10.3f}"
        name = re.sub(r"\s+", " ", each.kernel)[:40]
        lines.append(f"  {name:<40} {each.launches:8} {each.milliseconds:10.3f} {model}")
    return lines
