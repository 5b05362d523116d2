"""Stand-ins for the parts of ``torch.cuda`` that Megatron calls: one device, and it is the CPU.

Megatron asks for its device in many ways (``device="cuda"``, ``torch.cuda.current_device()``,
``tensor.cuda()``, ``tensor.type() == "torch.cuda.FloatTensor"``).  A ``TorchFunctionMode`` answers
those that go through a torch function, in the thread that installs it (the one that trains), and
functions of the module ``torch.cuda`` are replaced.
"""

import collections
import contextlib
import functools
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import torch.utils.data
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# Packages of GPU kernels.  Megatron picks them up where it finds them, and none runs on a CPU;
# where they are absent it falls back to torch.
_GPU_PACKAGES = (
    "amp_C",
    "apex",
    "deep_ep",
    "flash_attn",
    "flash_attn_3",
    "fused_weight_gradient_mlp_cuda",
    "grouped_gemm",
    "transformer_engine",
    "transformer_engine_torch",
)


class Stream:
    """``torch.cuda.Stream`` where everything has already happened in order."""

    cuda_stream = 0
    device = CPU
    priority = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority."""
        return 0, 0

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record ``event``, or a new one."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: "Event") -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing to wait for."""


class Event:
    """``torch.cuda.Event`` that notes the time of day, so that ``elapsed_time`` is a true one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to ``end``."""
        return (end._time - self._time) * 1e3

    def query(self) -> bool:
        """Whether the event has happened: always."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""


class Context(contextlib.ContextDecorator):
    """A context in which nothing changes; like ``torch.cuda.stream``'s, to be entered again."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


def _is_cuda(device: object) -> bool:
    """Whether ``device``, as any torch function may be given it, names a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args and _is_cuda(args[0]):
        args = (CPU, *args[1:])
    return tensor.to(*args, **kwargs)


def _type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:  # Megatron compares the answer with 'torch.cuda.FloatTensor' and the like
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.")
    return tensor.type(dtype, *args, **kwargs)


def _itself(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return tensor


def _nothing(*args: object, **kwargs: object) -> None:
    pass


_METHODS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.cuda: _itself,
    torch.Tensor.pin_memory: _itself,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
}


class CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that is asked for on a GPU to the CPU.

    ``tensor.is_cuda`` and ``tensor.device`` keep telling the truth, so that code which picks a
    kernel by them picks one that runs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or its stand-in, with the CPU for a GPU."""
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        else:
            kwargs = {}
        return _METHODS.get(func, func)(*args, **kwargs)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _memory_stats(device: object = None) -> dict[str, int]:
    """What Megatron reads of ``torch.cuda.memory_stats``; all other entries are 0."""
    stats: dict[str, int] = collections.defaultdict(int)
    for kind in ("allocated", "active", "reserved"):
        stats[f"{kind}_bytes.all.current"] = _resident()
        stats[f"{kind}_bytes.all.peak"] = _peak()
    return stats


def _properties(device: object = None) -> types.SimpleNamespace:
    """The device's description: that of a Hopper GPU where Megatron has to be told one."""
    return types.SimpleNamespace(
        name="CPU",
        major=9,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
    )


def _constant(value: object) -> Callable[..., Any]:
    def answer(*args: object, **kwargs: object) -> object:
        return value

    return answer


def _compile(model: Any = None, **kwargs: object) -> Any:
    """``torch.compile`` that leaves functions as they are, used plainly or as a decorator.

    Megatron has its fused functions compiled: on a CPU that needs a C++ compiler, and takes longer
    than the small models that are tried there.
    """
    return (lambda function: function) if model is None else model


def _without_pinned_memory(init: Callable[..., None]) -> Callable[..., None]:
    """``DataLoader.__init__`` for batches that are not copied to a GPU."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.pin_memory = False

    return wrapper


def _cuda_functions() -> dict[str, Any]:
    """All names of ``torch.cuda`` that are replaced."""
    stream = Stream()
    replaced: dict[str, Any] = {
        "is_available": _constant(True),
        "is_initialized": _constant(True),
        "is_bf16_supported": _constant(True),
        "is_current_stream_capturing": _constant(False),
        "device_count": _constant(1),
        "current_device": _constant(0),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": _properties,
        "Stream": Stream,
        "Event": Event,
        "device": Context,
        "stream": Context,
        "current_stream": _constant(stream),
        "default_stream": _constant(stream),
        "memory_allocated": lambda device=None: _resident(),
        "memory_reserved": lambda device=None: _resident(),
        "device_memory_used": lambda device=None: _resident(),
        "max_memory_allocated": lambda device=None: _peak(),
        "max_memory_reserved": lambda device=None: _peak(),
        "memory_stats": _memory_stats,
        "mem_get_info": lambda device=None: (
            psutil.virtual_memory().available,
            psutil.virtual_memory().total,
        ),
    }
    # A new function for each: torch._dynamo refuses one object that goes by two names.
    for name in (
        "_lazy_init",
        "init",
        "set_device",
        "set_stream",
        "synchronize",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
    ):
        replaced[name] = _constant(None)
    for name in ("utilization", "temperature", "power_draw", "clock_rate"):
        replaced[name] = _constant(0)
    for kind in (
        "Float",
        "Half",
        "BFloat16",
        "Double",
        "Byte",
        "Bool",
        "Char",
        "Short",
        "Int",
        "Long",
    ):
        replaced[f"{kind}Tensor"] = getattr(torch, f"{kind}Tensor")
    return replaced


def install() -> None:
    """Put the stand-ins in place, for good."""
    for package in _GPU_PACKAGES:
        # What has None for a module cannot be imported.
        sys.modules[package] = None  # type: ignore[assignment]
    for name, stand_in in _cuda_functions().items():
        setattr(torch.cuda, name, stand_in)
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(torch.cuda.nvtx, name, _constant(None))
    torch.cuda.nvtx.range = Context  # type: ignore[assignment]
    torch.compile = _compile
    # Not a torch function, so no mode sees it.
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    if hasattr(torch, "accelerator"):  # torch itself asks there: its optimizers, its data loader
        torch.accelerator.is_available = _constant(False)
    loader: Any = torch.utils.data.DataLoader
    loader.__init__ = _without_pinned_memory(loader.__init__)
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
