"""CAME's hyperparameters, validated in one place for the class and for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


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


def check_number(name: str, value: object, low: float, *, open_low: bool = False) -> float:
    """Return ``value`` as a float if it is finite and at least (``open_low``: above) ``low``.

    Raises:
        HyperparameterError: if it is not.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < low or (open_low and number == low):
        relation = "above" if open_low else "at least"
        raise HyperparameterError(name, value, f"a finite number {relation} {low:g}")
    return number


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

    @property
    def betas(self) -> tuple[float, float, float]:
        """As in a parameter group."""
        return self.beta1, self.beta2, self.beta3

    @property
    def eps(self) -> tuple[float, float]:
        """As in a parameter group."""
        return self.eps1, self.eps2
