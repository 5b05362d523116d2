"""``--came-spike-guard``: one decision for all optimizers of a model, on all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_came.core.spike_guard import SpikeGuard
from megatron_came.megatron.diagnostics import reduced
from megatron_came.megatron.run import arguments
from megatron_came.voice import say


class WithSpikeGuard:
    """A wrapper of Megatron's that reports a skipped step as Megatron's own skipped ones."""

    spike_guard: SpikeGuard | None = None  # of the model; None without the flag
    optimizer: Any

    def step_with_ready_grads(self) -> bool:
        """As Megatron's."""
        if self.spike_guard is not None and self.optimizer is None:
            self.spike_guard.allows(self)  # others wait for this rank
        is_taken: bool = super().step_with_ready_grads()  # type: ignore[misc]
        return is_taken and (self.spike_guard is None or self.spike_guard.is_taken)

    def begin_guarded(self, of_rank: bool) -> Tensor:
        """Stand in for CAME on a rank that has none."""
        return torch.zeros(2, dtype=torch.float64)


def guard_spikes(chain: Sequence[Any], factor: float) -> None:
    """Let a chain's optimizers, which Megatron steps one after another, ask one guard."""
    guard = SpikeGuard(factor, say)
    guard.members = [each.optimizer or each for each in chain]
    nothing = torch.zeros(2, dtype=torch.float64)
    # A rank's sums go over the ranks that share each optimizer's state, and then are added.
    guard.add_up = lambda sums: sum(map(reduced, sums, chain), start=nothing)
    guard.name_step = lambda: f"iteration {arguments().get('curr_iteration', 0) + 1}"
    for each in (*chain, *guard.members):
        each.spike_guard = guard
