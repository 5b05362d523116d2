"""Sums over ranks: one flat float64 buffer, one all-reduce a group, copies kept identical.

The number of collectives does not grow with the number of parameters, and a group of one rank
costs none.
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


def _order(request: Request) -> int:
    """Order the pieces of a DP group: those with a TP group, and with copies, are neighbours."""
    if request.copies_group is None:
        return 0 if request.tp_group is None else 3
    return 1 if request.tp_group is None else 2


class SumBuffer:
    """A flat float64 buffer of local sums that :meth:`reduce` completes.

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
        groups: list[ProcessGroup | None] = []
        for request in requests:
            if not any(request.dp_group is group for group in groups):
                groups.append(request.dp_group)
        order = sorted(
            range(len(requests)),
            key=lambda i: (
                next(k for k, group in enumerate(groups) if group is requests[i].dp_group),
                _order(requests[i]),
            ),
        )
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
        self._sums = [
            *_runs(offsets, "dp_group"),
            *_runs(offsets, "tp_group"),
        ]
        self._copies = _runs(offsets, "copies_group")

    def zero_(self) -> None:
        """Forget the sums of the last step."""
        self.flat.zero_()

    def reduce(self) -> None:
        """Complete every piece over its process groups, in place."""
        for start, stop, group in self._sums:
            dist.all_reduce(self.flat[start:stop], group=cast(dist.ProcessGroup, group))
        for start, stop, group in self._copies:
            dist.broadcast(self.flat[start:stop], group=cast(dist.ProcessGroup, group), group_src=0)


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
