"""Measures optimizers from outside: the bytes they keep and the time their steps take."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


@dataclass(frozen=True)
class Measured:
    """What one rank's optimizers hold and take.

    Attributes:
        weights: Elements that they update.
        main_weights: Bytes of fp32 weights beside the model's own.
        momentum: Bytes of first moments.
        second_moment: Bytes of second moments, or of the factors that stand for them.
        step_seconds: Median time of a step.
    """

    weights: int
    main_weights: int
    momentum: int
    second_moment: int
    step_seconds: float

    @property
    def memory(self) -> int:
        """Bytes of all three kinds."""
        return self.main_weights + self.momentum + self.second_moment


def count_bytes(
    optimizers: Iterable[torch.optim.Optimizer], *, main_weights: bool
) -> dict[str, int]:
    """Adds up what optimizers hold, from the tensors themselves.

    Args:
        optimizers: The optimizers, after at least one step.
        main_weights: Whether they update copies of the model's weights, to be counted, or the
            model's weights themselves.

    Returns:
        The four sizes of :class:`Measured`. State of a single element (step counters) is left out.
    """
    total = dict.fromkeys(("weights", "main_weights", "momentum", "second_moment"), 0)
    for optimizer in optimizers:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            total["weights"] += param.numel()
            total["main_weights"] += param.nbytes if main_weights else 0
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    total["momentum" if key == "exp_avg" else "second_moment"] += value.nbytes
    return total


class Meter:
    """Watches all optimizers of this process, from its making on."""

    def __init__(self) -> None:
        self._started = 0.0
        self._times: defaultdict[torch.optim.Optimizer, list[float]] = defaultdict(list)
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def read(self, *, main_weights: bool) -> Measured:
        """Returns what was seen so far; for ``main_weights`` see :func:`count_bytes`."""
        seconds = sum(statistics.median(times) for times in self._times.values())
        return Measured(**count_bytes(self._times, main_weights=main_weights), step_seconds=seconds)

    def _before(self, *_: Any) -> None:
        self._started = _now()

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._times[optimizer].append(_now() - self._started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
