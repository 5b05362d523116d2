"""CAME in the theoretical memory footprint that Megatron logs, which knows Adam's alone."""

import copy
from typing import Any

from megatron_came.memory.optimizers import came, element_bytes
from megatron_came.patching import Function

# What Megatron counts of a parameter: of weights and gradients, on every rank, and with Adam's main
# weights and two moments, which the distributed optimizer shards.
_REPLICATED, _ALL = 6, 18


def for_came(original: Function, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Let Megatron's ``compute_weight_and_optimizer_memory`` count what CAME keeps."""
    total = original(args, *rest, **kwargs)
    if args.optimizer != "came":
        return total
    whole = copy.copy(args)
    whole.use_distributed_optimizer = False
    parameters = original(whole) / _ALL
    # A total is 6 of each parameter and 12 of each that this rank updates; solved for these.
    sharded = (total - parameters * _REPLICATED) / (_ALL - _REPLICATED)
    weight, gradient = element_bytes(args)
    optimizer = came(args, args.came_momentum_dtype, args.came_main_params)
    # Factors are about a thousandth of a second moment.
    state = optimizer.state_per_element(weight)
    return parameters * (weight + gradient) + sharded * state
