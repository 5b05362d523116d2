"""How much memory a call takes at its peak."""

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes at the peak of a call beyond what was held before it.

    Args:
        call: without arguments.
        device: of its tensors. On a CPU, where others' allocations count as well and freed memory
            stays with the process, it is the sum of two exact counts: PyTorch's profiler knows of
            tensors, and ``tracemalloc`` of NumPy's arrays and Python's objects.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    tracemalloc.start()
    try:
        with (
            _without_native_lines(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            tracemalloc.reset_peak()
            # The profiler's own objects are none of the call's.
            before, _ = tracemalloc.get_traced_memory()
            call()
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    events = profiler.profiler.kineto_results.events()
    # Frees are negative.
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most + peak - before


@contextmanager
def _without_native_lines() -> Iterator[None]:
    """Keep back that memory from before the profiling is freed, which C++ code writes."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
