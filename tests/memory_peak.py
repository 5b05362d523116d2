"""How much memory a call takes at its peak, of PyTorch's tensors and NumPy's arrays."""

import tracemalloc

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(call, device):
    """Return the bytes at the peak of a call beyond what was held before it.

    Args:
        call: without arguments.
        device: of its tensors; on the CPU NumPy's arrays are counted as well.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            call()
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most + peak - before
