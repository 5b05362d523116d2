"""CAME in Megatron's theoretical memory footprint, which knows Adam's alone."""

from __future__ import annotations

import copy
from typing import Any

from megatron_came.patching import Function


def for_came(original: Function) -> Function:
    """Correct what Megatron logs at the first iteration."""

    def compute_weight_and_optimizer_memory(args: Any, *rest: Any, **kwargs: Any) -> Any:
        total = original(args, *rest, **kwargs)
        if args.optimizer != "came":
            return total
        # Of Megatron's 18 bytes per parameter, 6 are weights and gradients and are on every rank;
        # 12 are Adam's main weights, momentum and second moment, sharded with the distributed
        # optimizer. CAME has 8 of them; its factors are about a thousandth of a second moment.
        whole = copy.copy(args)
        whole.use_distributed_optimizer = False
        replicated = original(whole) * 6 / 18
        return replicated + (total - replicated) * 8 / 12

    return compute_weight_and_optimizer_memory
