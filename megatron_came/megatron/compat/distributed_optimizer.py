"""Megatron's ``DistributedOptimizer``, with what 0.19 lets an optimizer other than Adam say."""

from __future__ import annotations

import types
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as MegatronsOwn

from megatron_came.megatron.errors import HostError
from megatron_came.megatron.patching import Function
from megatron_came.megatron.versions import release

_ADAMS_KEYS = ("param", "exp_avg", "exp_avg_sq")
_KEYS = ("param", "exp_avg")


def _with_keys(method: Function) -> Function:
    """Copy a method in which the keys of Adam's state are written out, with those of CAME.

    Raises:
        HostError: the method does not hold Adam's keys.
    """
    code = method.__code__
    if _ADAMS_KEYS not in code.co_consts:
        raise HostError(
            f"--optimizer came does not fit this Megatron: {method.__qualname__} does not name "
            f"the state of Adam."
        )
    constants = tuple(_KEYS if value == _ADAMS_KEYS else value for value in code.co_consts)
    copy = types.FunctionType(
        code.replace(co_consts=constants),
        method.__globals__,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


def _for_other_optimizers() -> type:
    """Make a subclass for releases before 0.19, which take no optimizer but Adam."""

    class DistributedOptimizer(MegatronsOwn):  # type: ignore[misc]
        """Takes CAME, and gathers and scatters CAME's state for legacy checkpoints."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            adam = distrib_optimizer.Adam
            distrib_optimizer.Adam = torch.optim.Optimizer  # what isinstance() compares with
            try:
                super().__init__(*args, **kwargs)
            finally:
                distrib_optimizer.Adam = adam

        get_parameter_state_dp_zero = _with_keys(MegatronsOwn.get_parameter_state_dp_zero)
        load_parameter_state_from_dp_zero = _with_keys(
            MegatronsOwn.load_parameter_state_from_dp_zero
        )

    return DistributedOptimizer


DistributedOptimizer: Any = MegatronsOwn if release() >= (0, 19) else _for_other_optimizers()
