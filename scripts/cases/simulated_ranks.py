"""Ranks as threads of one process: collectives without starting processes."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import torch.distributed as dist

_current = threading.local()


class SimulatedGroup:
    """A process group of some of the simulated ranks.

    Args:
        ranks: the members.
        error: of the sums, as a fraction of them.
    """

    def __init__(self, ranks: Sequence[int], *, error: float = 0.0) -> None:
        self.ranks, self.error = list(ranks), error
        self.calls = 0
        self._barrier = threading.Barrier(len(self.ranks), timeout=60)
        self._tensors: list[torch.Tensor] = [torch.empty(0)] * len(self.ranks)

    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return every member's tensor, in the order of the members."""
        index = self.ranks.index(_current.rank)
        self._tensors[index] = tensor.clone()
        self._barrier.wait()
        everyone = list(self._tensors)
        if index == 0:
            self.calls += 1
        self._barrier.wait()
        return everyone

    def abort(self) -> None:
        """Let nobody wait any longer."""
        self._barrier.abort()


def _all_reduce(
    tensor: torch.Tensor,
    group: SimulatedGroup,
    op: dist.ReduceOp = dist.ReduceOp.SUM,
    async_op: bool = False,
) -> None:
    everyone = group.exchange(tensor)
    if op == dist.ReduceOp.MAX:
        tensor.copy_(torch.stack(everyone).amax(0))
        return
    tensor.copy_(sum(everyone[1:], everyone[0]) * (1 + group.error))


def run_ranks(
    count: int, program: Callable[[int], object], groups: Sequence[SimulatedGroup] = ()
) -> list:
    """Run ``program(rank)`` on every simulated rank and return what each returned.

    Args:
        count: number of ranks.
        program: what a rank does; it may use the collectives of core.sums on simulated groups.
        groups: released if a rank fails, so that the others do not wait for it.
    """

    def start(rank: int) -> object:
        _current.rank = rank
        try:
            return program(rank)
        except BaseException:
            for group in groups:
                group.abort()
            raise

    with (
        mock.patch("megatron_came.core.sums.dist.all_reduce", _all_reduce),
        ThreadPoolExecutor(count) as pool,
    ):
        futures = [pool.submit(start, rank) for rank in range(count)]
        errors = [error for future in futures if (error := future.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):  # which follows another's
                raise error
        return [future.result() for future in futures]
