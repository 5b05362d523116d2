"""``--came-rule``: other hyperparameters for parameters whose names match a pattern."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_came.core.hyperparameters import TABLE, HyperparameterError, Hyperparameters
from megatron_came.core.sums import largest
from megatron_came.megatron.errors import UnsupportedError
from megatron_came.megatron.parameter_names import (
    FACTORED,
    OWN_SETTINGS,
    named_parameters,
    original_of,
    within_wrappers,
)
from megatron_came.voice import EVERYONE, Groups, collectives_device, say_once

FLAG = "--came-rule"

_KINDS = {row.name: row.type for row in TABLE} | {FACTORED: bool}
_SWITCHES = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
# Numbers of layers and experts in a name, and how many there may be.
_NUMBER, _MOST = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\.weight)\d+$|(?<=\.bias)\d+$"), 1024
_TIED = "embedding.word_embeddings.weight"


class ParameterRule(NamedTuple):
    """One ``--came-rule``."""

    pattern: str  # of names, with the wildcards of a shell
    settings: dict[str, Any]  # by name
    typed: str  # the whole, for messages


def parsed(given: Sequence[Sequence[str] | str] | None) -> list[ParameterRule]:
    """Read all rules: of each a pattern and ``NAME=VALUE`` words, in a list or one text.

    Raises:
        ValueError: no setting, one that is unknown, or a value that is not allowed.
    """
    rules = []
    for each in given or ():
        pattern, *words = each.split() if isinstance(each, str) else each
        typed = " ".join((FLAG, pattern, *words))
        settings = dict(_setting(word, typed) for word in words)
        if not settings:
            raise ValueError(f"{typed} has no setting: add some, as in {FLAG} '*.bias' beta2=0.99.")
        try:
            Hyperparameters(**{k: v for k, v in settings.items() if k != FACTORED})
        except HyperparameterError as error:
            raise ValueError(error.said_of(f"{typed}: {error.name}")) from error
        rules.append(ParameterRule(pattern, settings, typed))
    return rules


def _setting(word: str, typed: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in _KINDS:
        raise ValueError(
            f"{typed}: {word} is no setting: give NAME=VALUE with one of {', '.join(_KINDS)}."
        )
    try:
        return name, _SWITCHES[value.lower()] if _KINDS[name] is bool else float(value)
    except (KeyError, ValueError):
        wanted = "yes or no" if _KINDS[name] is bool else "a number"
        raise ValueError(f"{typed}: {name} must be {wanted}, not {value!r}.") from None


def note(
    given: Sequence[Sequence[str] | str] | None,
    model_chunks: Sequence[Any],
    everyone: Groups = EVERYONE,
) -> None:
    """Give parameters what the rules say of them, see :func:`give`; a collective if there are any.

    The rules are the same on all ranks; ``everyone`` are groups as :func:`.agreement.connecting`
    returns them.

    Raises:
        UnsupportedError: on all ranks, if a rule matches no parameter of any, or would leave
            layers or experts unfactored that checkpoints hold in one tensor with others.
    """
    rules = parsed(given)
    named = give(rules, model_chunks)
    if not rules:
        return
    names = [name for name, _ in named]
    matches = [any(fnmatchcase(name, rule.pattern) for name in names) for rule in rules]
    # A pipeline stage may have none that a rule matches.
    found = torch.tensor([matches, [_parts(rule, names) for rule in rules]], dtype=torch.float64)
    if dist.is_initialized():
        groups = (dist.group.WORLD if group is None else group for group in everyone)
        largest(found, filter(None, groups), torch.device(collectives_device()))
    example = f", as {names[0]!r} is" if names else ""
    for rule, is_matched, is_parted in zip(rules, *found.tolist(), strict=True):
        if is_parted:
            raise UnsupportedError(
                f"{rule.typed} matches some layers or experts and not all, and checkpoints hold "
                f"these in one tensor: put * for their numbers, or leave {FACTORED} out."
            )
        if not is_matched:
            raise UnsupportedError(
                f"{rule.typed} matches no parameter that is trained: patterns are for whole "
                f"names{example}; begin and end them with * where names have more."
            )
    count = sum(bool(getattr(original_of(param), OWN_SETTINGS)) for _, param in named)
    say_once(f"{FLAG}: {count} of {len(named)} parameters of rank 0 have settings of their own.")


def _parts(rule: ParameterRule, names: Sequence[str]) -> bool:
    """Whether a rule for ``factored`` goes by the number of a layer or expert."""
    if FACTORED not in rule.settings:
        return False
    found = ((name, number) for name in names for number in _NUMBER.finditer(name))
    surroundings = {(name[: number.start()], name[number.end() :]) for name, number in found}
    return any(
        len({fnmatchcase(str(number).join(each), rule.pattern) for number in range(_MOST)}) > 1
        for each in surroundings
    )


def give(rules: Sequence[ParameterRule], model_chunks: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Give parameters what the rules say of them, as an attribute.

    Of several rules that match, the last that has a setting decides it.

    Returns:
        Names and parameters that are trained, if there are rules.
    """
    for _, param in named_parameters(model_chunks):
        vars(original_of(param)).pop(OWN_SETTINGS, None)  # from an optimizer before this one
    named = list(_named(model_chunks)) if rules else []
    for name, param in named:
        own: dict[str, Any] = {}  # set also where nothing matches
        for rule in rules:
            if fnmatchcase(name, rule.pattern):
                own |= rule.settings
        setattr(original_of(param), OWN_SETTINGS, own)
    return named


def _named(model_chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Name the parameters that are trained, with the layer's number in the whole model, from 0."""
    for chunk in model_chunks:
        layers = {
            within_wrappers(name): str(module.layer_number - 1)
            for name, module in chunk.named_modules()
            if name.rpartition(".")[2].isdecimal() and hasattr(module, "layer_number")
        }
        for name, param in named_parameters([chunk]):
            if not param.requires_grad:
                continue
            if getattr(param, "shared_embedding", False):
                name = _TIED  # the last pipeline stage has its copy in the output layer
            for layer, number in layers.items():
                if name.startswith(f"{layer}."):
                    stack = layer.rpartition(".")[0]
                    name = f"{stack}.{number}{name.removeprefix(layer)}"
                    break
            yield name, param
