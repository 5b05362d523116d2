"""CAME's hyperparameters, validated in one place for the class and for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch


class HyperparameterError(ValueError):
    """A hyperparameter outside its range.

    Attributes:
        name: field of :class:`Hyperparameters`.
        value: what was given.
        allowed: what is allowed, in words.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name, self.value, self.allowed = name, value, allowed
        super().__init__(f"CAME: {name} = {value!r} is not allowed; it must be {allowed}.")

    def within(self, where: str) -> HyperparameterError:
        """Return the same error with a place, in words, in its sentence."""
        return HyperparameterError(f"{self.name} of {where}", self.value, self.allowed)


def check_number(name: str, value: object, low: float, *, open_low: bool = False) -> float:
    """Return ``value`` as a float if it is finite and at least (``open_low``: above) ``low``.

    Raises:
        HyperparameterError: if it is not.
    """
    number = _number(value)
    if not math.isfinite(number) or number < low or (open_low and number == low):
        relation = "above" if open_low else "at least"
        raise HyperparameterError(name, value, f"a finite number {relation} {low:g}")
    return number


def _number(value: Any) -> float:
    """Return a number, or a tensor of one, as a float; NaN for all else.

    Text and truth values, which Python would turn into numbers, are mistakes.
    """
    is_truth = isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, bool)
    if is_truth or isinstance(value, str | bytes | bytearray):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What CAME has beyond a learning rate and weight decay; the authors' defaults.

    Args:
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the squared-gradient statistics, in [0, 1).
        beta3: decay of the instability statistics, in [0, 1).
        eps1: added to the squared gradient, above 0.
        eps2: added to the squared residual, above 0.
        clip_threshold: largest root mean square of an update before momentum (d in the paper),
            above 0.

    Raises:
        HyperparameterError: a value outside its range, with its name.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9999
    eps1: float = 1e-30
    eps2: float = 1e-16
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("beta"):
                if not check_number(field.name, value, 0.0) < 1.0:
                    raise HyperparameterError(field.name, value, "in [0, 1)")
            else:
                check_number(field.name, value, 0.0, open_low=True)

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """Read a ``torch.optim`` parameter group (keys betas, eps, clip_threshold).

        Raises:
            HyperparameterError: also for a wrong number of betas or eps.
        """
        betas, eps = group["betas"], group["eps"]
        for name, values, count in (("betas", betas, 3), ("eps", eps, 2)):
            if not isinstance(values, tuple | list) or len(values) != count:
                raise HyperparameterError(name, values, f"a tuple of {count} numbers")
        return cls(
            beta1=betas[0],
            beta2=betas[1],
            beta3=betas[2],
            eps1=eps[0],
            eps2=eps[1],
            clip_threshold=group["clip_threshold"],
        )

    @classmethod
    def at_step(cls, group: Mapping[str, Any]) -> Self:
        """Read a group as it is now: schedules and hosts change it. Rates in tensors are not read.

        Raises:
            HyperparameterError: a value that is no number, or out of range.
        """
        for key in ("lr", "weight_decay"):
            if not isinstance(group[key], torch.Tensor):  # it may lie on a device that is busy
                check_number(key, group[key], 0.0)
        return cls.from_group(group)

    @property
    def betas(self) -> tuple[float, float, float]:
        """As in a parameter group."""
        return self.beta1, self.beta2, self.beta3

    @property
    def eps(self) -> tuple[float, float]:
        """As in a parameter group."""
        return self.eps1, self.eps2


_SINGLE = ("lr", "weight_decay", "clip_threshold")


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Check a whole ``torch.optim`` parameter group, learning rate and weight decay included.

    Args:
        group: to be checked.
        where: what it is, in words, for the error.

    Raises:
        HyperparameterError: a value that is no number, or out of range.
    """
    try:
        check_number("lr", group["lr"], 0.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        Hyperparameters.from_group(group)
    except HyperparameterError as error:
        raise (error.within(where) if where else error) from None


def with_plain_numbers(group: MutableMapping[str, Any]) -> None:
    """Turn NumPy's numbers and the like into Python's, in place: ``torch.load`` refuses others.

    Tensors are kept: a learning rate on a device is read there.
    """
    for key in _SINGLE:
        value = group.get(key)
        if value is not None and type(value) not in (int, float, torch.Tensor):
            group[key] = float(value)
    for key in ("betas", "eps"):
        if key in group:
            group[key] = tuple(map(float, group[key]))
