"""Ranks update a parameter with the same settings or skip it together: seen in each step.

The numbers ride along with the sums of the first pass, so that this costs no collective of its own.
"""

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_came.core.parameter_slice import ParameterSlice, StepInputs
from megatron_came.core.sums import Request

# Marks are at most that, so that sums of their squares over two million ranks are exact.
_MARKS = 2**16 - 1


class Agreement:
    """Marks of what ranks do with parameters that all of them update, or none.

    A mark stands for the settings of a step, and is 0 where the parameter is skipped. Marks of n
    ranks are the same if n times the sum of their squares is the square of their sum.

    Args:
        slices: those of one device, in the order of all ranks.

    Attributes:
        requests: for the sums, whose views the methods take.
    """

    def __init__(self, slices: Sequence[ParameterSlice]) -> None:
        members: dict[Request, list[ParameterSlice]] = {}
        for slice_ in slices:
            if slice_.may_be_skipped and slice_.is_shared:
                members.setdefault(slice_.instability_requests()[0], []).append(slice_)
        self._members = list(members.values())
        self.requests = [replace(each, shape=(2, len(own))) for each, own in members.items()]
        self._ranks = [math.prod(g.size() for g in each.summed_over) for each in self.requests]

    def mark(self, inputs: Mapping[ParameterSlice, StepInputs], views: Sequence[Tensor]) -> None:
        """Write this rank's marks where they are to be summed."""
        known: dict[int, int] = {}  # by settings, which many parameters share
        for slices, view in zip(self._members, views, strict=True):
            marks = [0] * len(slices)
            for index, slice_ in enumerate(slices):
                if (given := inputs.get(slice_)) is not None:
                    if (key := id(given.settings)) not in known:
                        known[key] = _mark(given)
                    marks[index] = known[key]
            squares = [mark * mark for mark in marks]
            view.copy_(torch.tensor([marks, squares], dtype=torch.float64, device="cpu"))

    def check(self, taken: Collection[ParameterSlice], views: Sequence[Tensor]) -> None:
        """Compare the marks of all ranks, once their sums are complete.

        Raises:
            ValueError: ranks do not agree.
        """
        for slices, view, ranks in zip(self._members, views, self._ranks, strict=True):
            # On a device it waits for the backward pass, once a step.
            total, squares = view.to("cpu", torch.int64)
            for index in (total * total != ranks * squares).nonzero().flatten().tolist():
                slice_, sums = slices[index], (int(total[index]), int(squares[index]))
                raise ValueError(_difference(slice_, *sums, ranks, slice_ in taken))


def _mark(given: StepInputs) -> int:
    # A learning rate on a device may not be known yet: it is left out.
    settings = given.settings
    known = settings._replace(lr=-1.0) if isinstance(settings.lr, Tensor) else settings
    return zlib.crc32(repr(known).encode()) % _MARKS + 1


def _difference(slice_: ParameterSlice, total: int, squares: int, ranks: int, has: bool) -> str:
    held = f"{slice_.shard.numel} elements of {slice_.shard.shape}"
    mark = squares // total
    if mark * total == squares and total % mark == 0:  # all that have a mark have the same
        return (
            f"CAME: a parameter of which this rank holds {held} has a gradient on {total // mark} "
            f"of {ranks} ranks alone, and here {'one' if has else 'none'}: give it one on all, of "
            "zeros if need be, or on none."
        )
    return (
        "CAME: ranks differ in lr, weight_decay, betas, eps, clip_threshold or step of a parameter "
        f"of which this rank holds {held}: give all ranks the same."
    )
