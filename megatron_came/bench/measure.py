"""Time, memory and traffic of optimizer steps."""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_came.bench.contenders import Contender
from megatron_came.bench.peak import peak_of
from megatron_came.bench.shapes import Shape
from megatron_came.core.shard import Shard
from megatron_came.kernels.dispatch import choose
from megatron_came.terminal.progress import Progress

_COPY_BYTES = 2 * 2**30  # far beyond any cache, and beside which a launch takes nothing
_WARM_UP = 3  # steps of each contender


@dataclass(frozen=True, slots=True)
class Result:
    """One contender's step."""

    name: str  # of the contender
    milliseconds: float  # median
    fastest: float  # of the timed steps, in milliseconds
    steps: int  # timed
    ns_per_parameter: float  # of the parameters that the rank updates
    # What a step reads and writes at least, see ``Contender.floor``.
    floor_bytes_per_parameter: float | None
    gigabytes_per_second: float | None  # floor's bytes over the median
    fraction_of_floor: float | None  # the least time over the median; see :func:`_least_seconds`
    # Peak of the memory taken during a step beyond what was held before it, see ``peak_of``.
    extra_mebibytes: float
    collectives: int  # of one step
    mebibytes_sent: float  # handed to collectives in one step


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parameters(
    shapes: Sequence[Shape], device: torch.device, ranks: int
) -> tuple[list[Tensor], dict[Tensor, Shard]]:
    """Make what the middle one of so many data-parallel ranks updates, with gradients.

    As the distributed optimizer does, the parameters lie one after another in a flat buffer, and a
    rank has one part of it.
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    low, high = (sum(sizes) * part // ranks for part in (ranks // 2, ranks // 2 + 1))
    group: Any = dist.group.WORLD if ranks > 1 else None
    params: list[Tensor] = []
    shards: dict[Tensor, Shard] = {}
    offset = 0
    for shape, size in zip(shapes, sizes, strict=True):
        start, stop = (min(max(bound - offset, 0), size) for bound in (low, high))
        offset += size
        own_shape = shape if ranks == 1 else (stop - start,)
        values = torch.randn(own_shape, device=device, generator=generator)
        param: Tensor = torch.nn.Parameter(values * 0.02)
        param.grad = torch.randn(own_shape, device=device, generator=generator) * 1e-3
        params.append(param)
        shards[param] = Shard(shape, start, stop, dp_group=group)
    return params, shards


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on a GPU, by the GPU's own clock."""
    free, _ = torch.cuda.mem_get_info(device)
    # In fp32; the target is as large.
    source = torch.zeros(min(_COPY_BYTES, free // 4) // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):  # the first two are slower, and left out
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        target.copy_(source)
        events[1].record()
        synchronize(device)
        times.append(float(events[0].elapsed_time(events[1])) / 1e3)
    return 2 * source.nbytes / statistics.median(times[2:])


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the bytes that each collective is handed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self.sent.append(sum(tensor.nbytes for tensor in args[0]))
        return func(*args, **(kwargs or {}))


def _floor_bytes(
    contender: Contender, params: Sequence[Tensor], shards: Mapping[Tensor, Shard]
) -> int | None:
    """What a step reads and writes at least."""
    if contender.floor is None:
        return None
    backend = choose("auto", params[0].device).backend
    fitting = getattr(backend, "cache_elements", None) or 0
    total = 0
    for param in params:
        # With several ranks an all-reduce over all parameters comes between two passes.
        stays = param.dim() > 1 and param.numel() <= fitting and shards[param].dp_group is None
        floor = contender.cached_floor if stays else None
        total += param.numel() * (floor or contender.floor)
    return total


def _least_seconds(contender: Contender, moved: int, count: int, bandwidth: float) -> float:
    """Return the time of bare loops with the same traffic on a CPU, of a copy on other devices."""
    if bandwidth:
        return moved / bandwidth
    from megatron_came.bench.floors import seconds_per_parameter  # needs Numba

    return count * seconds_per_parameter(contender.traffic, contender.momentum)


def measure(
    contenders: Sequence[Contender],
    params: list[Tensor],
    shards: Mapping[Tensor, Shard],
    *,
    steps: int,
    bandwidth: float,
) -> list[Result]:
    """Time the contenders' steps, after warm-up, and count what else they cost.

    They take turns, on the same parameters and gradients: what else goes on in the machine slows
    all of them. The bandwidth is that of copies on the device, in bytes a second; 0 on a CPU.
    """
    device = params[0].device
    optimizers = [contender.build(params, shards) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    rounds = _WARM_UP + steps
    with Progress("Timing", rounds * len(optimizers), sys.stderr) as progress:
        for _ in range(rounds):
            for optimizer, taken in zip(optimizers, times, strict=True):
                start = time.perf_counter()
                optimizer.step()
                synchronize(device)
                taken.append((time.perf_counter() - start) * 1e3)
                progress.advance(1)
    return [
        _result(contender, optimizer, params, shards, taken[_WARM_UP:], bandwidth)
        for contender, optimizer, taken in zip(contenders, optimizers, times, strict=True)
    ]


def _result(
    contender: Contender,
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    shards: Mapping[Tensor, Shard],
    times: list[float],
    bandwidth: float,
) -> Result:
    extra = peak_of(optimizer.step, params[0].device)
    sent: list[int] = []
    if dist.is_initialized():
        with _Collectives() as collectives:
            optimizer.step()
        sent = collectives.sent
    count = sum(param.numel() for param in params)
    median = statistics.median(times)
    moved = _floor_bytes(contender, params, shards)
    least = None if moved is None else _least_seconds(contender, moved, count, bandwidth)
    return Result(
        name=contender.name,
        milliseconds=median,
        fastest=min(times),
        steps=len(times),
        ns_per_parameter=median * 1e6 / count,
        floor_bytes_per_parameter=None if moved is None else moved / count,
        gigabytes_per_second=None if moved is None else moved / median / 1e6,
        fraction_of_floor=None if least is None else least / (median / 1e3),
        extra_mebibytes=extra / 2**20,
        collectives=len(sent),
        mebibytes_sent=sum(sent) / 2**20,
    )
