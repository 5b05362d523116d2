"""A step's order of work: parameters in chunks, each with its buffers of sums and its passes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.parameter_slice import ParameterSlice
from megatron_came.core.sums import CopyBuffer, SumBuffer
from megatron_came.kernels.backend import Kernels
from megatron_came.kernels.dispatch import obstacle
from megatron_came.kernels.eager import PlainPasses
from megatron_came.kernels.triton.fused import FusedPasses

# Bytes of sums from which on a chunk is worth a reduction of its own, and the most chunks.
_SHARED_CHUNK_BYTES = 32 * 1024 * 1024
_MAX_SHARED_CHUNKS = 4


class Chunk:
    """Parameters that go through a step together.

    Their sums are reduced after each of the first two passes, unless all are local. Where other
    ranks hold copies of a tensor, both go on from the same sums: while other parameters are
    updated, the first rank's are sent, those of the first pass included, and copies update their
    second moments anew.

    Args:
        works: the parameters, on one device.
        kernels: for those that they can bear; None for plain PyTorch alone.

    Attributes:
        left: of each parameter that the kernels leave to plain PyTorch, why.
    """

    def __init__(self, works: Sequence[ParameterSlice], kernels: Kernels | None) -> None:
        device = works[0].param.device
        square_requests = [work.square_requests() for work in works]
        instability_requests = [work.instability_requests() for work in works]
        self._squares = SumBuffer(list(chain.from_iterable(square_requests)), device)
        self._instability = SumBuffer(list(chain.from_iterable(instability_requests)), device)
        squares, instability = iter(self._squares.views), iter(self._instability.views)
        for work, first, second in zip(works, square_requests, instability_requests, strict=True):
            work.bind([next(squares) for _ in first], [next(instability) for _ in second])
        self._works = works
        copies = {work: group for work in works if (group := work.copies_group) is not None}
        self._copies = list(copies)
        self._copied_sums = CopyBuffer(
            [(view, group) for work, group in copies.items() for view in work.sums], device
        )
        obstacles = {work: obstacle(kernels, work) for work in works}
        fused = [work for work, why in obstacles.items() if why is None]
        plain = [work for work, why in obstacles.items() if why is not None]
        self.left = [why for why in obstacles.values() if kernels is not None and why is not None]
        self._passes: list[tuple[PlainPasses | FusedPasses, set[ParameterSlice]]] = []
        if plain:
            self._passes.append((PlainPasses(plain), set(plain)))
        if fused and kernels is not None:
            self._passes.append((FusedPasses(fused, kernels, self.is_local), set(fused)))

    @property
    def is_local(self) -> bool:
        """Whether no sum goes over ranks."""
        return not (self._squares.is_reduced or self._instability.is_reduced or self._copies)

    def _begin(self, active: Container[ParameterSlice]) -> None:
        self._squares.zero_()
        self._instability.zero_()
        self._active_copies = [work for work in self._copies if work in active]
        for passes, works in self._passes:
            passes.begin([work for work in self._works if work in works and work in active])

    def step(self, active: Container[ParameterSlice]) -> None:
        """All passes of those parameters that take part in this step, where no sum is reduced."""
        self._begin(active)
        for passes, _ in self._passes:
            passes.step()
            passes.end()

    def add_square_sums(self, active: Container[ParameterSlice]) -> None:
        """Pass 1, likewise."""
        self._begin(active)
        for passes, _ in self._passes:
            passes.add_square_sums()
        self._squares.start()

    def add_instability_sums(self) -> None:
        """Second moments and pass 2."""
        self._squares.finish()
        for work in self._active_copies:
            work.keep_second_moment()
        for passes, _ in self._passes:
            passes.add_instability_sums()
        self._instability.start()

    def apply(self) -> None:
        """Instabilities and pass 3, but of copies."""
        self._instability.finish()
        self._copied_sums.start()
        for passes, _ in self._passes:
            passes.apply()

    def apply_copies(self) -> None:
        """The same of copies; the end of the step."""
        self._copied_sums.finish()
        for work in self._active_copies:
            work.restore_second_moment()
        for passes, _ in self._passes:
            passes.apply_copies()
            passes.end()


class Plan:
    """The chunks of an optimizer's parameters.

    Args:
        works: all parameters, in an order that is the same on all ranks.
        kernels: by device.
        param_groups: as they are now; :meth:`fits` compares with them.

    Attributes:
        left: why kernels leave parameters to plain PyTorch, of each, where there are kernels.
    """

    def __init__(
        self,
        works: list[ParameterSlice],
        kernels: dict[torch.device, Kernels | None],
        param_groups: Sequence[dict[str, Any]],
    ) -> None:
        self.works = works
        self._groups = list(param_groups)
        self._params = [list(group["params"]) for group in param_groups]
        self._natures = _natures(self._params)
        self.local: list[Chunk] = []
        self.shared: list[Chunk] = []
        for device in dict.fromkeys(work.param.device for work in works):
            here = [work for work in works if work.param.device == device]
            alone = [work for work in here if not work.is_shared]
            shared = [work for work in here if work.is_shared]
            here_kernels = kernels[device]
            if alone:
                self.local.append(Chunk(alone, here_kernels))
            sizes = [8 * sum(r.numel for r in work.instability_requests()) for work in shared]
            parts = min(max(sum(sizes) // _SHARED_CHUNK_BYTES, 1), _MAX_SHARED_CHUNKS)
            for members in _spread(shared, sizes, parts):
                self.shared.append(Chunk(members, here_kernels))
        self.left = [why for chunk in (*self.local, *self.shared) for why in chunk.left]

    def fits(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups are the plan's, and hold its parameters, where they were."""
        params = [group["params"] for group in param_groups]
        return (
            _are_same(param_groups, self._groups)
            and all(map(_are_same, params, self._params))
            and _natures(params) == self._natures
        )


def _are_same(objects: Sequence[object], others: Sequence[object]) -> bool:
    return len(objects) == len(others) and all(map(is_, objects, others))


def _natures(params: Sequence[Sequence[Tensor]]) -> list[tuple[object, ...]]:
    """What of tensors decides who updates them, and how."""
    tensors = list(chain.from_iterable(params))
    kinds = map(attrgetter("device", "dtype", "shape"), tensors)
    return list(zip(kinds, map(Tensor.is_contiguous, tensors), strict=True))


def _spread(
    works: Sequence[ParameterSlice], sizes: Sequence[int], parts: int
) -> Iterable[list[ParameterSlice]]:
    """Cut a list of parameters into at most so many chunks of about the same size.

    Those of which other ranks hold copies stay together: they take one broadcast, into however
    many chunks the other ranks cut what they hold.
    """
    chunks: list[list[ParameterSlice]] = [[] for _ in range(parts)]
    before = 0
    for work, size in zip(works, sizes, strict=True):
        middle = before + size / 2
        place = min(int(middle * parts / sum(sizes)), parts - 1)
        chunks[0 if work.copies_group is not None else place].append(work)
        before += size
    return filter(None, chunks)
