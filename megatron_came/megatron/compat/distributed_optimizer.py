"""Megatron's ``DistributedOptimizer``, with what 0.19 lets an optimizer other than Adam say."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as MegatronsOwn

from megatron_came.patching import Function
from megatron_came.versions import MegatronError, release

# Megatron's precision-aware optimizer reads gradients where they were reduced, which this private
# setting of its configuration decides.
PRECISION_AWARE = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"

_ADAMS_KEYS = ("param", "exp_avg", "exp_avg_sq")
_KEYS = ("param", "exp_avg")  # of what is sharded as the weights are: factors are whole


@contextlib.contextmanager
def precision_aware(config: Any, value: bool) -> Iterator[None]:
    """Set it for a while."""
    usual = getattr(config, PRECISION_AWARE)
    setattr(config, PRECISION_AWARE, value)
    try:
        yield
    finally:
        setattr(config, PRECISION_AWARE, usual)


# What differs are constants and a name: a method written anew would have to follow each release.
def _copied(method: Function, constants: tuple[Any, ...], **names: Any) -> Function:
    """Copy a method with other constants, and with other values of some global names."""
    copy = types.FunctionType(
        method.__code__.replace(co_consts=constants),
        {**method.__globals__, **names} if names else method.__globals__,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__  # which FunctionType does not take
    return copy


def _with_keys(method: Function) -> Function:
    """Copy a method in which the keys of Adam's state are written out, with those of CAME."""
    constants = method.__code__.co_consts
    if _ADAMS_KEYS not in constants:  # another release's has to be looked at
        raise MegatronError(
            f"--optimizer came does not fit this Megatron: {method.__qualname__} does not name "
            f"the state of Adam."
        )
    return _copied(method, tuple(_KEYS if each == _ADAMS_KEYS else each for each in constants))


def _for_other_optimizers() -> type:
    """Make a subclass for releases before 0.19, which take no optimizer but Adam."""
    own_init = MegatronsOwn.__init__

    class DistributedOptimizer(MegatronsOwn):  # type: ignore[misc]
        """Takes CAME, and gathers and scatters CAME's state for legacy checkpoints."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # ``Adam`` is what it compares the optimizer's type with, and nothing else.
            init = _copied(own_init, own_init.__code__.co_consts, Adam=torch.optim.Optimizer)
            init(self, *args, **kwargs)

        get_parameter_state_dp_zero = _with_keys(MegatronsOwn.get_parameter_state_dp_zero)
        load_parameter_state_from_dp_zero = _with_keys(
            MegatronsOwn.load_parameter_state_from_dp_zero
        )

    return DistributedOptimizer


DistributedOptimizer: Any = MegatronsOwn if release() >= (0, 19) else _for_other_optimizers()
