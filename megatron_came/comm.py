"""Sums over ranks: one flat float64 buffer, one all-reduce a group, copies kept identical.

The number of collectives does not grow with the number of parameters, a group of one rank costs
none, and they run while the caller computes something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron_came.layout import ProcessGroup


@dataclass(frozen=True, slots=True)
class Request:
    """A piece of the buffer and the ranks it is summed over.

    Args:
        shape: shape of the view that the piece is read and written through.
        dp_group: first summed over these ranks.
        tp_group: then over these.
        copies_group: finally made bit-identical on these ranks, which have computed the same
            sums of the same numbers in possibly another order.
    """

    shape: tuple[int, ...]
    dp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None
    copies_group: ProcessGroup | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class SumBuffer:
    """A flat float64 buffer of local sums that :meth:`start` and :meth:`finish` complete.

    Every rank of a group must build its buffer from the same requests in the same order, those
    of parameters it holds no element of included.

    Args:
        requests: the pieces; ``self.views[i]`` belongs to ``requests[i]``.
        device: where the buffer lies.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        requests = [
            Request(r.shape, _several(r.dp_group), _several(r.tp_group), _several(r.copies_group))
            for r in requests
        ]
        order = _order(requests)
        self.flat = torch.zeros(sum(r.numel for r in requests), dtype=torch.float64, device=device)
        views: dict[int, Tensor] = {}
        offsets: list[tuple[int, int, Request]] = []
        offset = 0
        for index in order:
            request = requests[index]
            views[index] = self.flat[offset : offset + request.numel].view(request.shape)
            offsets.append((offset, offset + request.numel, request))
            offset += request.numel
        self.views = [views[index] for index in range(len(requests))]
        # Pieces whose sums over the first group are not complete yet wait for a second one.
        self._first = _runs(offsets, "dp_group")
        self._second = _runs(offsets, "tp_group")
        self._copies = _runs(offsets, "copies_group")
        self._under_way: list[dist.Work] = []

    @property
    def is_reduced(self) -> bool:
        """Whether any piece goes over ranks at all."""
        return bool(self._first or self._second or self._copies)

    def zero_(self) -> None:
        """Forget the sums of the last step, also of one that has failed on the way."""
        self._wait()
        if self.flat.device.type == "cpu":
            self.flat.numpy().fill(0.0)  # in a forked process PyTorch would wait for threads
        else:
            self.flat.zero_()

    def start(self) -> None:
        """Start to complete every piece over its process groups; :meth:`finish` must follow."""
        self._all_reduce(self._first or self._second)

    def finish(self) -> None:
        """Wait until every piece is complete. Waits on the device's stream where it has one."""
        self._wait()
        if self._first and self._second:
            self._all_reduce(self._second)
            self._wait()
        for start, stop, group in self._copies:
            dist.broadcast(self.flat[start:stop], group=cast(dist.ProcessGroup, group), group_src=0)

    def _all_reduce(self, runs: list[tuple[int, int, ProcessGroup]]) -> None:
        for start, stop, group in runs:
            work = dist.all_reduce(
                self.flat[start:stop], group=cast(dist.ProcessGroup, group), async_op=True
            )
            if work is not None:  # on ranks outside the group
                self._under_way.append(work)

    def _wait(self) -> None:
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


def _order(requests: Sequence[Request]) -> list[int]:
    """Order the pieces so that those which one collective can take are neighbours.

    Copies are of one tensor, the tied embeddings, so that at most two first groups have any.
    """
    groups: list[ProcessGroup | None] = []
    for request in sorted(requests, key=lambda r: r.copies_group is None):  # copies first
        if not any(request.dp_group is group for group in groups):
            groups.append(request.dp_group)

    def key(index: int) -> tuple[int, int]:
        request = requests[index]
        group = next(k for k, group in enumerate(groups) if group is request.dp_group)
        if request.copies_group is None:
            return group, 0 if request.tp_group is None else 4
        if request.tp_group is not None:
            return group, 3
        return group, -1 if group else 2  # where the second group begins the first one ends

    return sorted(range(len(requests)), key=key)


def _several(group: ProcessGroup | None) -> ProcessGroup | None:
    return None if group is None or group.size() == 1 else group


def _runs(
    offsets: Sequence[tuple[int, int, Request]], attribute: str
) -> list[tuple[int, int, ProcessGroup]]:
    """Merge neighbouring pieces that share the process group ``attribute``."""
    runs: list[tuple[int, int, ProcessGroup]] = []
    for start, stop, request in offsets:
        group: ProcessGroup | None = getattr(request, attribute)
        if group is None:
            continue
        if runs and runs[-1][2] is group and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop, group)
        else:
            runs.append((start, stop, group))
    return runs
