"""Stand-ins for the parts of ``torch.cuda`` that Megatron calls: one device, and it is the CPU.

Megatron asks for its device in many ways (``device="cuda"``, ``torch.cuda.current_device()``,
``tensor.cuda()``, ``tensor.type() == "torch.cuda.FloatTensor"``).  A ``TorchFunctionMode`` answers
those that go through a torch function, in the thread that installs it (the one that trains), and
functions of the module ``torch.cuda`` are replaced.
"""

import collections
import contextlib
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed.device_mesh
import torch.utils.data
from torch.overrides import TorchFunctionMode

from megatron_came.patching import Function, around

CPU = torch.device("cpu")

# Packages of GPU kernels.  Megatron picks them up where it finds them, and none runs on a CPU;
# where they are absent it falls back to torch.
_GPU_PACKAGES = (
    *("amp_C", "apex", "deep_ep", "flash_attn", "flash_attn_3", "fused_weight_gradient_mlp_cuda"),
    *("grouped_gemm", "transformer_engine", "transformer_engine_torch"),
)


class _Idle(contextlib.ContextDecorator):
    """Takes anything, can be entered again and again, and has nothing to do or to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def query(self) -> bool:
        """Whether all is done: always."""
        return True

    def _nothing(self, *args: object) -> None:
        pass

    synchronize = wait = wait_event = wait_stream = _nothing


class Event(_Idle):
    """``torch.cuda.Event`` that notes the time of day, so that ``elapsed_time`` is a true one."""

    _time = 0.0

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, end: Self) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._time - self._time) * 1e3


class Stream(_Idle):
    """``torch.cuda.Stream`` where everything has already happened in order."""

    cuda_stream = 0
    device = CPU
    priority = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority."""
        return 0, 0

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event``, or a new one."""
        event = event or Event()
        event.record()
        return event


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


_METHODS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.Tensor.cuda, torch.Tensor.pin_memory), lambda tensor, *_, **__: tensor),
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
        if not kwargs:  # as of most calls, of which an iteration of training has thousands
            return _METHODS.get(func, func)(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return _METHODS.get(func, func)(*args, **kwargs)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _memory_stats() -> dict[str, int]:
    """What Megatron reads of ``torch.cuda.memory_stats``; all other entries are 0."""
    stats: dict[str, int] = collections.defaultdict(int)
    for kind in ("allocated", "active", "reserved"):
        stats[f"{kind}_bytes.all.current"] = _resident()
        stats[f"{kind}_bytes.all.peak"] = _peak()
    return stats


def _properties() -> types.SimpleNamespace:
    """The device's description: that of a Hopper GPU where Megatron has to be told one."""
    return types.SimpleNamespace(
        name="CPU",
        major=9,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
    )


def _compile(model: Any = None, **kwargs: object) -> Any:
    """``torch.compile`` that leaves functions as they are, used plainly or as a decorator.

    Megatron has its fused functions compiled: on a CPU that needs a C++ compiler, and takes longer
    than the small models that are tried there.
    """
    return (lambda function: function) if model is None else model


def _without_pinned_memory(init: Function, self: Any, *args: Any, **kwargs: Any) -> None:
    """``DataLoader.__init__`` for batches that are not copied to a GPU."""
    init(self, *args, **kwargs)
    self.pin_memory = False


def _mesh_of_cpus(
    from_group: Function, group: Any, device_type: str, *args: Any, **kwargs: Any
) -> Any:
    """``DeviceMesh.from_group`` for FSDP2, whose mesh Megatron makes of GPUs."""
    kind = "cpu" if _is_cuda(device_type) else device_type
    return from_group(group, kind, *args, **kwargs)


def _still_a_cpu(run: Function, *args: Any, **kwargs: Any) -> Any:
    """Go backward in the mode, which is off inside any torch function, as ``backward`` is one."""
    with CudaMeansCpu():
        return run(*args, **kwargs)


def _answer(value: Any) -> Callable[..., Any]:
    """Return a function with one answer, a new one: torch._dynamo refuses one with two names."""
    return lambda *args, **kwargs: value


def _measured(measure: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function of a device, which is the only one."""
    return lambda device=None: measure()


# What functions of ``torch.cuda`` answer; those that measure are below.
_ANSWERS: dict[str, object] = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": "CPU",
    **dict.fromkeys(("utilization", "temperature", "power_draw", "clock_rate"), 0),
    **dict.fromkeys(("_lazy_init", "init", "set_device", "set_stream", "synchronize")),
    **dict.fromkeys(("empty_cache", "ipc_collect")),
    **dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated")),
}
_MEASURED: dict[str, Callable[[], Any]] = {
    "get_device_properties": _properties,
    "memory_stats": _memory_stats,
    **dict.fromkeys(("memory_allocated", "memory_reserved", "device_memory_used"), _resident),
    **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), _peak),
    "mem_get_info": lambda: (psutil.virtual_memory().available, psutil.virtual_memory().total),
}
_TENSORS = ("Float", "Half", "BFloat16", "Double", "Byte", "Bool", "Char", "Short", "Int", "Long")


def _cuda_functions() -> dict[str, Any]:
    """All names of ``torch.cuda`` that are replaced."""
    stream = Stream()
    return {
        "Stream": Stream,
        "Event": Event,
        "device": _Idle,
        "stream": _Idle,
        "current_stream": _answer(stream),
        "default_stream": _answer(stream),
        **{name: _answer(value) for name, value in _ANSWERS.items()},
        **{name: _measured(measure) for name, measure in _MEASURED.items()},
        **{f"{kind}Tensor": getattr(torch, f"{kind}Tensor") for kind in _TENSORS},
    }


def install() -> None:
    """Put the stand-ins in place, for good."""
    for package in _GPU_PACKAGES:
        # What has None for a module cannot be imported.
        sys.modules[package] = None  # type: ignore[assignment]
    for name, stand_in in _cuda_functions().items():
        setattr(torch.cuda, name, stand_in)
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(torch.cuda.nvtx, name, _answer(None))
    torch.cuda.nvtx.range = _Idle  # type: ignore[assignment]
    torch.compile = _compile
    # Not a torch function, so no mode sees it.
    torch.Tensor.record_stream = _answer(None)  # type: ignore[method-assign]
    mesh: Any = torch.distributed.device_mesh.DeviceMesh
    mesh.from_group = staticmethod(around(_mesh_of_cpus, mesh.from_group))
    # torch itself asks there: its optimizers, its data loader.
    torch.accelerator.is_available = _answer(False)
    autograd: Any = torch.autograd
    autograd._engine_run_backward = around(_still_a_cpu, autograd._engine_run_backward)
    loader: Any = torch.utils.data.DataLoader
    loader.__init__ = around(_without_pinned_memory, loader.__init__)
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
