"""Replacing a function of the host wherever it is referred to."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from megatron_came.megatron.errors import HostError

Function = Callable[..., Any]

# What a function has been replaced by already.
_MARK = "_megatron_came_makers"


def wrap(module_name: str, name: str, make: Callable[[Function], Function]) -> None:
    """Replace a function by ``make(original)``, also where another module has imported it.

    Once only: a function that the same ``make`` has replaced is left alone.

    Args:
        module_name: module that defines the function.
        name: its name there.
        make: takes the original function and returns what stands in for it.

    Raises:
        HostError: the module has no such function.
    """
    original = getattr(importlib.import_module(module_name), name, None)
    if not callable(original):
        raise HostError(
            f"--optimizer came does not fit this Megatron: {module_name} has no function {name}."
        )
    replacement = _stand_in(original, make)
    if replacement is original:
        return
    for module in list(sys.modules.values()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, key, replacement)


def wrap_method(
    module_name: str, class_name: str, name: str, make: Callable[[Function], Function]
) -> None:
    """Replace a method of a class by ``make(original)``, once only; see :func:`wrap`.

    Raises:
        HostError: the module has no such class, or the class no such method.
    """
    owner = getattr(importlib.import_module(module_name), class_name, None)
    original = getattr(owner, name, None)
    if not callable(original):
        raise HostError(
            f"--optimizer came does not fit this Megatron: {module_name} has no "
            f"{class_name}.{name}."
        )
    setattr(owner, name, _stand_in(original, make))


def _stand_in(original: Function, make: Callable[[Function], Function]) -> Function:
    """Return ``make(original)``, or the original where ``make`` has made it already."""
    makers, name_of_make = getattr(original, _MARK, ()), f"{make.__module__}.{make.__qualname__}"
    if name_of_make in makers:
        return original
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, (*makers, name_of_make))
    return replacement
