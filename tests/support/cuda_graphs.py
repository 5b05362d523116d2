"""What stands in for CUDA graphs where there is no GPU.

Of a capture it keeps the kernels that are launched, with their grids, numbers, and the addresses of
tensors: all that a graph keeps. A replay runs these kernels on what then lies at the addresses.
"""

import ctypes
import threading
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

_current = threading.local()  # ranks may be threads


class _NothingElse(TorchDispatchMode):
    """A graph would compute it at each replay, and not now."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} in the capture of a graph")


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.launches = []

    def replay(self):
        """Run what was captured."""
        for executor, arguments, named in self.launches:
            executor(*map(_found, arguments), **{key: _found(it) for key, it in named.items()})


@contextmanager
def graph(graph, *, stream, capture_error_mode):
    """``torch.cuda.graph``."""
    assert capture_error_mode == "thread_local"
    _current.graph = graph
    try:
        with _NothingElse():
            yield
    finally:
        del _current.graph


def use(monkeypatch):
    """Capture in stand-ins."""
    launch = GridExecutor.__call__

    def launch_or_keep(executor, *arguments, **named):
        graph = getattr(_current, "graph", None)
        if graph is None:
            return launch(executor, *arguments, **named)
        named = {key: _kept(value) for key, value in named.items()}
        return graph.launches.append((executor, [*map(_kept, arguments)], named))

    monkeypatch.setattr(GridExecutor, "__call__", launch_or_keep)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)


class _Memory(tuple):
    """Address, dtype and number of elements of a tensor."""


def _kept(value):
    if not isinstance(value, torch.Tensor):
        return value
    return _Memory((value.data_ptr(), value.dtype, value.numel()))


def _found(value):
    if not isinstance(value, _Memory):
        return value
    address, dtype, numel = value
    if not numel:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_byte * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
