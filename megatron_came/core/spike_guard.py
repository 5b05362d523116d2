"""A step whose update is far larger than those before it is not taken.

What counts is the root mean square of u, over all parameters, before clipping: it is known before
the last pass writes anything but r, c and v.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.hyperparameters import HyperparameterError, check_number

# The median is that of so many steps, those that were skipped included; of fewer than the second
# number nothing is skipped but what is not finite.
WINDOW, LEAST = 128, 16


class SpikeGuard:
    """Decides about steps, for all of a model's optimizers on all ranks alike.

    Args:
        factor: a step is skipped from so many times the median of the RMS of u on.

    Attributes:
        members: the optimizers that step together; none for the one that asks. Their
            ``begin_guarded(of_rank)`` takes the first two passes and returns the sum of u^2, and of
            how many elements; of this rank's share alone, where ``add_up`` is to add up the rest.
        add_up: turns the members' sums into those of the whole model; None adds these alone.
        say: is told of each skipped step in a sentence.
        name_step: as "iteration 3", to begin the sentence; None counts steps.
        skipped: number of steps.

    Raises:
        HyperparameterError: the factor is not above 1.
    """

    def __init__(self, factor: float, say: Callable[[str], None]) -> None:
        if check_number("spike_guard", factor, 1.0) <= 1.0:
            raise HyperparameterError("spike_guard", factor, "a finite number above 1")
        self.factor, self.say, self.skipped = factor, say, 0
        self.members: Sequence[Any] = ()
        self.add_up: Callable[[Sequence[Tensor]], Tensor] | None = None
        self.is_taken, self._count = True, 0
        self.name_step: Callable[[], str] | None = None
        self._waiting: list[Any] = []
        self._seen: deque[float] = deque(maxlen=WINDOW)

    def allows(self, member: Any) -> bool:
        """Whether a member's step is to be taken; the first that asks begins the step of all."""
        if not any(member is each for each in self._waiting):
            self._waiting = list(self.members or [member])
            sums = [each.begin_guarded(self.add_up is not None) for each in self._waiting]
            total = torch.stack(sums).sum(0) if self.add_up is None else self.add_up(sums)
            self._judge(*total.tolist())
        self._waiting = [each for each in self._waiting if each is not member]
        return self.is_taken

    def _judge(self, squares: float, numel: float) -> None:
        self._count += 1
        rms = math.sqrt(squares / numel) if numel else 0.0
        usual = median(self._seen) if len(self._seen) >= LEAST else math.inf
        self.is_taken = rms < self.factor * usual
        if not self.is_taken:
            self.skipped += 1
            where = self.name_step() if self.name_step else f"CAME: step {self._count}"
            how = f"{rms / usual:.2f} times the median of {len(self._seen)} steps, {usual:.4g}"
            self.say(
                f"{where} is skipped, weights and state stay as they were: the RMS of "
                f"its update is {rms:.4g}, {how if math.isfinite(rms) else 'not a finite number'} "
                f"(skipped so far: {self.skipped}; spike guard {self.factor:g})."
            )
        if math.isfinite(rms):
            self._seen.append(rms)
