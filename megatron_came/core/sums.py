"""Sums over ranks: one flat float64 buffer, one all-reduce a group; one broadcast for copies.

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
    from megatron_came.core.shard import ProcessGroup


@dataclass(frozen=True, slots=True)
class Request:
    """A piece of the buffer and the ranks it is summed over.

    Args:
        shape: shape of the view that the piece is read and written through.
        dp_group: first summed over these ranks.
        tp_group: then over these.
    """

    shape: tuple[int, ...]
    dp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class _Buffer:
    """Collectives that run on a flat float64 buffer."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self.flat = torch.zeros(numel, dtype=torch.float64, device=device)
        self._under_way: list[dist.Work] = []

    def _note(self, work: dist.Work | None) -> None:
        if work is not None:  # on ranks outside the group
            self._under_way.append(work)

    def _wait(self) -> None:
        """Wait for what runs. Waits on the device's stream where it has one."""
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


class SumBuffer(_Buffer):
    """Local sums that :meth:`start` and :meth:`finish` complete.

    Every rank of a group must build its buffer from the same requests in the same order, those
    of parameters it holds no element of included.

    Args:
        requests: the pieces; ``self.views[i]`` belongs to ``requests[i]``.
        device: where the buffer lies.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        super().__init__(sum(request.numel for request in requests), device)
        requests = [Request(r.shape, _several(r.dp_group), _several(r.tp_group)) for r in requests]
        views: dict[int, Tensor] = {}
        offsets: list[tuple[int, int, Request]] = []
        offset = 0
        for index in _order(requests):
            request = requests[index]
            views[index] = self.flat[offset : offset + request.numel].view(request.shape)
            offsets.append((offset, offset + request.numel, request))
            offset += request.numel
        self.views = [views[index] for index in range(len(requests))]
        # Pieces whose sums over the first group are not complete yet wait for a second one.
        self._first = _runs(offsets, "dp_group")
        self._second = _runs(offsets, "tp_group")

    @property
    def is_reduced(self) -> bool:
        """Whether any piece goes over ranks at all."""
        return bool(self._first or self._second)

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
        """Wait until every piece is complete."""
        self._wait()
        if self._first and self._second:
            self._all_reduce(self._second)
            self._wait()

    def _all_reduce(self, runs: list[tuple[int, int, ProcessGroup]]) -> None:
        for start, stop, group in runs:
            piece = self.flat[start:stop]
            self._note(dist.all_reduce(piece, group=cast(dist.ProcessGroup, group), async_op=True))


class CopyBuffer(_Buffer):
    """Complete sums of tensors that other ranks hold copies of.

    Those ranks have computed the same sums of the same numbers, in possibly another order:
    :meth:`start` and :meth:`finish` replace them by the sums of the group's first rank.

    Args:
        pieces: pieces of a sum buffer, and the ranks that hold the copies; in an order that is
            the same on these ranks.
        device: where the buffer lies.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, ProcessGroup]], device: torch.device) -> None:
        super().__init__(sum(view.numel() for view, _ in pieces), device)
        self._groups = list({id(group): group for _, group in pieces}.values())
        self._views = [
            [view.view(-1) for view, other in pieces if other is group] for group in self._groups
        ]
        self._parts: list[Tensor] = []
        offset = 0
        for views in self._views:
            size = sum(view.numel() for view in views)
            self._parts.append(self.flat[offset : offset + size])
            offset += size

    def start(self) -> None:
        """Send them on their way: one broadcast a group; :meth:`finish` must follow."""
        self._wait()  # after a step that has failed on the way
        for part, views, group in zip(self._parts, self._views, self._groups, strict=True):
            torch.cat(views, out=part)
            self._note(
                dist.broadcast(
                    part, group=cast(dist.ProcessGroup, group), group_src=0, async_op=True
                )
            )

    def finish(self) -> None:
        """Wait for them and write them to the sum buffers."""
        self._wait()
        for part, views in zip(self._parts, self._views, strict=True):
            offset = 0
            for view in views:
                view.copy_(part[offset : offset + view.numel()])
                offset += view.numel()


def _order(requests: Sequence[Request]) -> list[int]:
    """Order the pieces so that those which one collective can take are neighbours."""
    # In the order of their first request, which is the same on all ranks.
    places: dict[int, int] = {id(None): -1}
    for request in requests:
        for group in (request.dp_group, request.tp_group):
            places.setdefault(id(group), len(places))

    def key(index: int) -> tuple[int, int]:
        request = requests[index]
        return places[id(request.dp_group)], places[id(request.tp_group)]

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
