"""The optimizers that are compared, by name, and what they keep."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from megatron_came.core.hyperparameters import HyperparameterError, Hyperparameters
from megatron_came.optimizer import CAME
from megatron_came.terminal.sentences import CommandError

type Betas = tuple[float, float, float]
type Built = list[torch.optim.Optimizer]

_MOMENTA = {"int8": torch.int8, "bf16": torch.bfloat16}
_LIONS = ("emerging_optimizers.scalar_optimizers", "lion_pytorch")


def _came(model: nn.Module, betas: Betas, options: Mapping[str, Any]) -> Built:
    beta2, beta3 = (options.get(f"beta{i}", betas[i - 1]) for i in (2, 3))
    own: dict[str, Any] = {name.replace("-", "_"): True for name in options.keys() & _CAME_SWITCHES}
    momentum = next((_MOMENTA[name] for name in options if name in _MOMENTA), torch.float32)
    own |= {"betas": (betas[0], beta2, beta3), "momentum_dtype": momentum}
    return [CAME(model.parameters(), lr=1.0, **own)]


def _adamw(model: nn.Module, betas: Betas, options: Mapping[str, Any]) -> Built:
    pair = betas[0], options.get("beta2", betas[1])
    return [torch.optim.AdamW(model.parameters(), betas=pair, weight_decay=0.0)]


def _muon(model: nn.Module, betas: Betas, options: Mapping[str, Any]) -> Built:
    """Muon for the matrices between embedding and head, AdamW at the same rate for the rest."""
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    rest = [p for p in model.parameters() if all(p is not one for one in hidden)]
    muon = _class(("torch.optim",), "Muon")
    return [
        muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=betas[:2], weight_decay=0.0),
    ]


def _class(modules: Sequence[str], name: str) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


@dataclass(frozen=True)
class _Family:
    """A kind of optimizer: how it is built, its usual rates, its options, and where it is from."""

    build: Callable[[nn.Module, Betas, Mapping[str, Any]], Built]
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    remedy: str = ""


_CAME_SWITCHES = ("no-confidence", "cautious", "bias-correction")
_FAMILIES = {
    "came": _Family(_came, options=(*_CAME_SWITCHES, *_MOMENTA, "beta2", "beta3")),
    "adamw": _Family(_adamw, options=("beta2",)),
    # PyTorch's multiplies its rate with the root mean square of the weight.
    "adafactor": _Family(
        lambda model, *_: [torch.optim.Adafactor(model.parameters())],
        rates=(1e-2, 3e-2, 1e-1, 3e-1),
    ),
    "sgd": _Family(
        lambda model, betas, _: [torch.optim.SGD(model.parameters(), momentum=betas[0])],
        rates=(3e-2, 1e-1, 3e-1, 1.0),
    ),
    "lion": _Family(
        lambda model, *_: [_class(_LIONS, "Lion")(model.parameters(), weight_decay=0.0)],
        rates=(1e-4, 3e-4, 1e-3, 3e-3),
        modules=_LIONS,
        remedy="pip install lion-pytorch",
    ),
    "muon": _Family(_muon, modules=("torch.optim",), remedy="install PyTorch 2.9 or newer"),
}
_CONTRADICTIONS = (("int8", "bf16"), ("no-confidence", "beta3"))


@dataclass(frozen=True)
class Contender:
    """An optimizer with its options."""

    name: str  # as it was written, which heads its rows
    rates: tuple[float, ...]  # learning rates to try
    missing: str | None  # what has to be installed for it, if something has
    # Makes the optimizers of all parameters of a model, each exactly once.
    build: Callable[[nn.Module, Betas], Built]


def parse(name: str) -> Contender:
    """Read ``FAMILY[+OPTION[=VALUE]]...``, such as ``came+cautious+beta3=0.999``.

    Raises:
        CommandError: an unknown optimizer or option, or options that contradict each other.
    """
    kind, *words = name.split("+")
    if kind not in _FAMILIES:
        raise CommandError(f"{kind} is no optimizer here: take one of {', '.join(_FAMILIES)}.")
    family = _FAMILIES[kind]
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in family.options:
            known = ", ".join(family.options) or "none"
            raise CommandError(f"{name}: {kind} has no option {word}; it has {known}.")
        if key in options:
            raise CommandError(f"{name} says {key} twice: leave one out.")
        options[key] = _decay(name, word) if key.startswith("beta") else not value
        if options[key] is False:
            raise CommandError(f"{name}: {key} takes no value: leave out ={value}.")
    for one, other in _CONTRADICTIONS:
        if one in options and other in options:
            raise CommandError(f"{name}: {one} and {other} contradict each other: leave one out.")
    missing = None
    if family.modules and not _class(family.modules, kind.capitalize()):
        missing = f"{name} is in none of the installed packages: {family.remedy}, or leave it out"
    return Contender(
        name, family.rates, missing, lambda model, betas: family.build(model, betas, options)
    )


def _decay(name: str, word: str) -> float:
    key, _, value = word.partition("=")
    try:
        given: dict[str, Any] = {key: float(value)}
        Hyperparameters(**given)
    except (HyperparameterError, ValueError):
        raise CommandError(f"{name}: {word} is not allowed: give {key} in [0, 1).") from None
    return float(value)


def state_bytes(optimizers: Built) -> int:
    """Return the bytes of all tensors that the optimizers keep of their parameters."""
    kept = tree_leaves([list(each.state.values()) for each in optimizers])
    tensors = {id(one): one for one in kept if isinstance(one, Tensor)}
    return sum(one.untyped_storage().nbytes() for one in tensors.values())
