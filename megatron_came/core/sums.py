"""Sums over ranks: one flat float64 buffer, one all-reduce for each group.

The number of collectives does not grow with the number of parameters, a group of one rank costs
none, and they run while the caller computes something else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came.core.shard import ProcessGroup


@dataclass(frozen=True, slots=True)
class Request:
    """Sums that a parameter needs, and the ranks that hold their addends."""

    shape: tuple[int, ...]  # of the view that they are read and written through
    dp_group: ProcessGroup | None = None  # first summed over these ranks
    tp_group: ProcessGroup | None = None  # last over these
    # These ranks then hold the same sums, added up in another order: all go on from the largest, so
    # that what they compute stays the same to the last bit. Of equal numbers, however many, that is
    # the number itself.
    copies_group: ProcessGroup | None = None
    more_groups: tuple[ProcessGroup, ...] = ()  # between the two, over one after another

    @property
    def numel(self) -> int:
        """Number of sums."""
        return torch.Size(self.shape).numel()

    @property
    def summed_over(self) -> list[ProcessGroup]:
        """The groups of all ranks that hold addends."""
        groups = (self.dp_group, *self.more_groups, self.tp_group)
        return [group for group in groups if group is not None]

    def of_several_ranks(self) -> "Request":
        """Return the request without groups of one rank."""
        dp_group, tp_group = _several(self.dp_group), _several(self.tp_group)
        copies_group, more = _several(self.copies_group), tuple(filter(_several, self.more_groups))
        return Request(self.shape, dp_group, tp_group, copies_group, more)


class _Reduction(NamedTuple):
    """One all-reduce of neighbouring sums: [start, stop) of the buffer."""

    start: int
    stop: int
    group: ProcessGroup
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM


class SumBuffer:
    """Local sums that :meth:`start` and :meth:`finish` complete.

    Every rank of a group must build its buffer from the same requests in the same order, those
    of parameters it holds no element of included. Ranks with copies may differ in all others.

    Args:
        requests: ``self.views[i]`` belongs to ``requests[i]``.
        device: where the buffer lies and is reduced.
        on_host: by request, whether its view lies on the CPU, in a second buffer of the same
            places: what is added there joins the first before it is reduced. None for all not.

    Attributes:
        host: the second buffer, without elements where there is none.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        device: torch.device,
        on_host: Sequence[bool] | None = None,
    ) -> None:
        numel = sum(request.numel for request in requests)
        self.flat = torch.zeros(numel, dtype=torch.float64, device=device)
        on_host = [False] * len(requests) if on_host is None else on_host
        self.host = new_on_host(numel if any(on_host) else 0, torch.float64, device).zero_()
        self._has_sent = False
        requests = [request.of_several_ranks() for request in requests]
        bounds: dict[int, tuple[int, int]] = {}
        stop = 0
        for index in _order(requests):
            start, stop = stop, stop + requests[index].numel
            bounds[index] = start, stop
        self.views = [
            (self.host if is_on_host else self.flat)[slice(*bounds[index])].view(request.shape)
            for index, (request, is_on_host) in enumerate(zip(requests, on_host, strict=True))
        ]
        over_dp = _merged((*bounds[index], requests[index].dp_group) for index in bounds)
        more = zip_longest(*(requests[index].more_groups for index in bounds))
        over_more = [
            _merged((*at, group) for at, group in zip(bounds.values(), groups, strict=True))
            for groups in more
        ]
        over_tp = _merged((*bounds[index], requests[index].tp_group) for index in bounds)
        # Not merged, in the order of the requests: the ranks' buffers may differ in all others.
        over_copies = [
            _Reduction(*bounds[index], request.copies_group, dist.ReduceOp.MAX)
            for index, request in enumerate(requests)
            if request.copies_group is not None
        ]
        # A round begins when the one before it is complete.
        self._rounds = [each for each in (over_dp, *over_more, over_tp, over_copies) if each]
        self._to_come: list[Sequence[_Reduction]] = []
        self._under_way: list[dist.Work] = []

    @property
    def is_reduced(self) -> bool:
        """Whether any sum goes over ranks at all."""
        return bool(self._rounds)

    def zero_(self) -> None:
        """Forget the sums of the last step, also of one that has failed on the way."""
        self._wait()
        self._has_sent = False
        for buffer in (self.flat, self.host):
            if buffer.device.type == "cpu" and type(buffer) is Tensor:  # not one of FakeTensorMode
                buffer.numpy().fill(0.0)  # in a forked process PyTorch would wait for threads
            else:
                buffer.zero_()

    def start(self) -> None:
        """Start to complete all sums over their process groups; :meth:`finish` must follow."""
        if self.host.numel():  # each sum is zero in one of the two
            self.flat.add_(self.host.to(self.flat.device, non_blocking=True))
            self._has_sent = True
        self._to_come = list(self._rounds[1:])
        for reductions in self._rounds[:1]:
            self._reduce(reductions)

    def finish(self) -> None:
        """Wait until all sums are complete, as they may be already."""
        self._wait()
        while self._to_come:
            self._reduce(self._to_come.pop(0))
            self._wait()
        if self._has_sent:
            self.host.copy_(self.flat)
            self._has_sent = False

    def _reduce(self, reductions: Sequence[_Reduction]) -> None:
        for start, stop, group, op in reductions:
            group = cast(dist.ProcessGroup, group)
            work = dist.all_reduce(self.flat[start:stop], op=op, group=group, async_op=True)
            if work is not None:  # on ranks outside the group
                self._under_way.append(work)

    def _wait(self) -> None:
        """Wait for what is under way: on the device's stream, where it has one."""
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


def largest(values: Tensor, groups: Iterable[ProcessGroup], device: torch.device) -> Tensor:
    """Return the largest values of ranks that must go on from the same ones, in ``values``.

    They should be equal, but may have been added up in another order. NaN counts as infinite, since
    its maximum is not the same on all ranks. Groups follow one another; their collectives work on
    ``device``.
    """
    for group in filter(_several, groups):
        there = values.nan_to_num(torch.inf, torch.inf).to(device)
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=cast(dist.ProcessGroup, group))
        values.copy_(there)
    return values


def new_on_host(numel: int, dtype: torch.dtype, device: torch.device, pin: bool = True) -> Tensor:
    """Make room on the CPU for what goes to a device and back: pinned, unless that is the CPU."""
    return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=pin and device.type == "cuda")


def _order(requests: Sequence[Request]) -> list[int]:
    """Order the requests so that those which one collective can take are neighbours."""
    # Groups count in the order of their first request, which is the same on all ranks.
    numbers: dict[int, int] = {id(None): -1}
    for request in requests:
        for group in request.summed_over:
            numbers.setdefault(id(group), len(numbers))

    def key(index: int) -> tuple[int, ...]:
        request = requests[index]
        groups = (request.dp_group, request.tp_group, *request.more_groups)
        return tuple(numbers[id(group)] for group in groups)

    return sorted(range(len(requests)), key=key)


def _several(group: ProcessGroup | None) -> ProcessGroup | None:
    return None if group is None or group.size() == 1 else group


def _merged(sums: Iterable[tuple[int, int, ProcessGroup | None]]) -> list[_Reduction]:
    """Take neighbours of one group, [start, stop) of each, together."""
    merged: list[_Reduction] = []
    for start, stop, group in sums:
        if group is None:
            continue
        if merged and merged[-1].group is group and merged[-1].stop == start:
            merged[-1] = merged[-1]._replace(stop=stop)
        else:
            merged.append(_Reduction(start, stop, group))
    return merged
