"""CAME's hyperparameters, validated in one place for the class and for the command line."""

import math
import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex, TypeGuard, cast

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

    def said_of(self, name: str) -> str:
        """Return the sentence for who knows the hyperparameter by another name."""
        return f"{name} {self.value} is not allowed: it must be {self.allowed}."

    def within(self, where: str) -> "HyperparameterError":
        """Return the same error with a place, in words, in its sentence."""
        return HyperparameterError(f"{self.name} in {where}", self.value, self.allowed)


# What a schedule that ends at 0 may be below it: LinearLR's last rate is -4e-19.
_ROUNDING = 1e-12


def check_number(name: str, value: object, low: float) -> float:
    """Return ``value`` as a float if it is finite and, but for rounding, at least ``low``.

    Raises:
        HyperparameterError: if it is not.
    """
    number = _number(value)
    if not math.isfinite(number) or number < low - _ROUNDING:
        raise HyperparameterError(name, value, f"a finite number at least {low:g}")
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


def _is_tuple(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a tuple, a list, or a list of a configuration, as OmegaConf's."""
    if isinstance(value, tuple):  # of every step; the others take ten times as long
        return True
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _plain(value: Any) -> Any:
    """Return a tensor of one number as that number, which kernels take; all else as it is."""
    is_one = isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype != torch.bool
    return value.item() if is_one else value


class _Range(NamedTuple):
    """What values are allowed: in words, and which."""

    words: str
    holds: Callable[[Any], bool]


_DECAY = _Range("in [0, 1)", lambda value: 0.0 <= _number(value) < 1.0)
_POSITIVE = _Range("a finite number above 0", lambda value: 0.0 < _number(value) < math.inf)
_SWITCH = _Range("True or False", lambda value: isinstance(value, bool))


def _hyperparameter(default: float, allowed: _Range, help_: str, *, key: str | None = None) -> Any:
    """Declare one: its default, the authors', its range, and the help of its flag.

    ``key`` is that of parameter groups, of a tuple of all that have it, in order; None for its own
    name.
    """
    own_key = {} if key is None else {"key": key}
    return field(default=default, metadata={"allowed": allowed, "help": help_, **own_key})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What CAME has beyond a learning rate and weight decay; the authors' defaults.

    This is the one table of them. Parameter groups, their checks, flags, Megatron's configuration,
    what ranks compare and the columns of Triton's tables are made of it, by :data:`TABLE`.

    Raises:
        HyperparameterError: a value outside its range, with its name.
    """

    beta1: float = _hyperparameter(0.9, _DECAY, "decay of CAME's momentum", key="betas")
    beta2: float = _hyperparameter(
        0.999, _DECAY, "decay of CAME's squared-gradient statistics", key="betas"
    )
    beta3: float = _hyperparameter(
        0.9999,
        _DECAY,
        "decay of CAME's instability statistics; without bias correction the first updates are, "
        "with the default, up to 11 times the learning rate in RMS: warm up",
        key="betas",
    )
    eps1: float = _hyperparameter(1e-30, _POSITIVE, "added to the squared gradient", key="eps")
    eps2: float = _hyperparameter(1e-16, _POSITIVE, "added to the instability", key="eps")
    clip_threshold: float = _hyperparameter(
        1.0, _POSITIVE, "largest root mean square of an update before momentum"
    )
    bias_correction: bool = _hyperparameter(
        False, _SWITCH, "divide CAME's three averages by 1 - beta^t, as Adam does its two"
    )
    cautious: bool = _hyperparameter(
        False, _SWITCH, "leave out of an update what has another sign than its gradient"
    )
    no_confidence: bool = _hyperparameter(
        False, _SWITCH, "the momentum is the update, as in Adafactor with momentum"
    )

    def __post_init__(self) -> None:
        for row in TABLE:
            value = getattr(self, row.name)
            if not row.allowed.holds(value):
                raise HyperparameterError(row.name, value, row.allowed.words)

    def at(self, iteration: int) -> "Hyperparameters":
        """Return what the arithmetic of an iteration, from 1 on, takes: decays carry out options.

        An average divided by 1 - b^t is an average with the decay b (1 - b^(t-1)) / (1 - b^t). So
        with bias correction the factors r, c, R, C and v are kept as they are after it. Without
        confidence R and C are one, and a decay of one leaves them so.
        """
        if not (self.bias_correction or self.no_confidence):
            return self
        beta2, beta3 = self.beta2, self.beta3
        if self.bias_correction:
            beta2, beta3 = (
                b * (1 - b ** (iteration - 1)) / (1 - b**iteration) for b in (beta2, beta3)
            )
        if self.no_confidence:
            beta3 = 1.0
        return _AtIteration(**{**asdict(self), "beta2": beta2, "beta3": beta3})

    def momentum_weight(self, iteration: int) -> float:
        """Return what the momentum is to be divided by: 1 - b1^t with bias correction, or 1.

        Not the momentum in u^ - m, which would be zero at t = 1.
        """
        return 1 - self.beta1**iteration if self.bias_correction else 1.0

    @staticmethod
    def from_group(group: Mapping[str, Any]) -> "Hyperparameters":
        """Read a ``torch.optim`` parameter group; one that it lacks has its default.

        Raises:
            HyperparameterError: also for a wrong number of betas or eps.
        """
        values = {}
        for key, names in GROUP_KEYS.items():
            if key not in group:
                continue
            found = group[key]
            if names == [key]:
                values[key] = found
            elif not _is_tuple(found) or len(found) != len(names):
                raise HyperparameterError(key, found, f"a tuple of {len(names)} numbers")
            else:
                values.update(zip(names, found, strict=True))
        plain = {name: _plain(value) for name, value in values.items()}
        try:
            return _once(**plain)
        except TypeError:  # what has no hash
            return Hyperparameters(**plain)

    def as_group(self) -> dict[str, Any]:
        """Return the keys of a ``torch.optim`` parameter group that hold them."""
        return {
            key: getattr(self, key)
            if names == [key]
            else tuple(getattr(self, name) for name in names)
            for key, names in GROUP_KEYS.items()
        }


# Once of the same values: every step reads every group.
_once = lru_cache(typed=True)(Hyperparameters)


class _AtIteration(Hyperparameters):
    """What :meth:`Hyperparameters.at` returns; a decay may be one."""

    def __post_init__(self) -> None:
        pass


class Row(NamedTuple):
    """One hyperparameter, for whoever makes something of all of them."""

    name: str  # of the field; its flag is --came- and the name
    type: type
    default: float  # the authors'; of options, off
    allowed: _Range
    help: str  # of the flag
    key: str  # in parameter groups


TABLE = tuple(
    Row(one.name, type(one.default), cast(float, one.default), **{"key": one.name, **one.metadata})
    for one in fields(Hyperparameters)
)
# By key of a parameter group: the names of what it holds.
GROUP_KEYS = {row.key: [each.name for each in TABLE if each.key == row.key] for row in TABLE}


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Check a whole ``torch.optim`` parameter group, learning rate and weight decay included.

    Raises:
        HyperparameterError: a value that is no number, or out of range; its sentence says where the
            group comes from.
    """
    check_switches(group)
    try:
        check_number("lr", group["lr"], 0.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        Hyperparameters.from_group(group)
    except HyperparameterError as error:
        raise (error.within(where) if where else error) from None


def check_switches(group: Mapping[str, Any]) -> None:
    """Check what ``torch.optim`` calls switches; ``foreach`` and ``fused`` mean nothing here.

    Raises:
        ValueError: one that CAME does not do, or that is no truth value.
    """
    for key in ("maximize", "foreach", "fused", "differentiable", "capturable"):
        if not isinstance(value := group.get(key), bool | None):
            raise HyperparameterError(key, value, "True, False or None")
    if not isinstance(factored := group.get("factored", True), bool):
        raise HyperparameterError("factored", factored, "True or False")
    if group.get("differentiable"):
        raise ValueError(
            "CAME: differentiable=True is not supported, since its kernels write behind "
            "autograd's back: leave it out."
        )
    if group.get("capturable"):
        raise ValueError(
            "CAME: capturable=True is not supported: learning rate and the number of steps are "
            "read anew in each step, which a CUDA graph would not do: leave it out, or give "
            "cuda_graph=True."
        )


def check_step(value: object, where: str = "") -> int:
    """Return a group's number of steps.

    Raises:
        HyperparameterError: no whole number, or a negative one; of a saved group, whose place the
            sentence says, also a float, which stops counting where it is large.
    """
    step = _number(value)
    if where:
        try:
            operator.index(cast("SupportsIndex", value))
        except (TypeError, ValueError, RuntimeError):
            step = math.nan
    if not step.is_integer() or step < 0:
        error = HyperparameterError("step", value, "a whole number at least 0")
        raise error.within(where) if where else error
    return int(step)


class GroupSettings(NamedTuple):
    """What a step reads of a parameter group.

    Bias correction is carried out by these: of the momentum by the rate.
    """

    hyper: Hyperparameters
    lr: float | torch.Tensor  # a scalar tensor may lie on the device
    weight_decay: float  # decoupled
    step: int  # number of steps before this one


def at_step(group: Mapping[str, Any]) -> GroupSettings:
    """Read a group as it is now, since schedules change it.

    Raises:
        HyperparameterError: a value that is no number, or out of range; of a rate in a tensor on
            another device, which may be busy, the size and dtype are looked at alone.
    """
    check_switches(group)
    lr: Any = group.get("lr")
    weight_decay = check_number("weight_decay", group.get("weight_decay"), 0.0)
    if not isinstance(lr, torch.Tensor) or lr.device.type == "cpu":
        check_number("lr", lr, 0.0)
    elif lr.numel() != 1 or lr.dtype == torch.bool or lr.is_complex():
        raise HyperparameterError("lr", lr, "one real number")
    # Files may hold the step as a tensor, of which powers would be fp32.
    hyper, step = Hyperparameters.from_group(group), check_step(group.get("step", 0))
    weight = hyper.momentum_weight(step + 1)
    if weight != 1.0:
        lr, weight_decay = lr / weight, weight_decay * weight
    return GroupSettings(hyper.at(step + 1), lr, weight_decay, step)


def with_plain_numbers(group: MutableMapping[str, Any]) -> None:
    """Turn NumPy's numbers and the like into Python's, in place: ``torch.load`` refuses others.

    A learning rate in a tensor is kept: on a device it is read there.
    """
    for key in ("lr", "weight_decay", *GROUP_KEYS):
        value = group.get(key)
        if _is_tuple(value):
            group[key] = tuple(map(float, value))
        elif key == "lr" and isinstance(value, torch.Tensor):
            continue
        elif value is not None and type(value) not in (int, float, bool):
            group[key] = float(value)
