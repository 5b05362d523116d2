"""What the elements of a stored tensor are like, seen one part at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_came.checkpoint_files.stored import Stored


@dataclass(slots=True)
class Values:
    """What was seen of a tensor's elements.

    Attributes:
        seen: how many are numbers.
        nans: how many are none.
        infinities: how many are infinite.
        negatives: how many are below zero.
        least: of those that are numbers.
        greatest: likewise.
    """

    seen: int = 0
    nans: int = 0
    infinities: int = 0
    negatives: int = 0
    least: float = float("inf")
    greatest: float = float("-inf")

    def add(self, values: Tensor) -> None:
        """Look at some more elements."""
        if values.is_complex():
            values = torch.view_as_real(values)
        if values.is_floating_point() and values.dtype.itemsize < 4:
            values = values.float()
        elif values.dtype == torch.bool:
            values = values.byte()
        if values.is_floating_point():
            wrong = int(values.isnan().sum())
            if wrong:
                values = values[~values.isnan()]
            self.nans += wrong
            self.infinities += int(values.isinf().sum())
        if values.numel():
            least, greatest = values.aminmax()
            self.least = min(self.least, float(least))
            self.greatest = max(self.greatest, float(greatest))
            if least < 0:
                self.negatives += int((values < 0).sum())
            self.seen += values.numel()

    @classmethod
    def of(cls, tensor: Stored) -> Values:
        """Look at all elements of a tensor.

        Raises:
            CheckpointError: it cannot be read.
        """
        values = cls()
        for box in tensor.boxes():
            values.add(box.values)
        return values
