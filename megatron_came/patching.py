"""Names of Megatron that something stands in for: one kind of row, and one way to put it in place.

Each room that changes Megatron has one table of rows: ``megatron/install.py``,
``cpu_megatron/install.py`` and ``memory/__init__.py``. No other line assigns to a name of
Megatron's, but those of ``memory/stand_ins.py``, for as long as a prediction lasts.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_came.versions import (
    IN_DEVELOPMENT,
    SUPPORTED,
    MegatronError,
    check_version,
    has_training_loop,
)

Function = Callable[..., Any]

# On a function that stands in for another: all ``by`` that have made it.
_MARK = "_megatron_came_makers"
_MAKER = "_megatron_came_makes"

# Whose functions, and whose decorators, are no replacements made by somebody else.
_KNOWN = {"megatron", "megatron_came", "torch", "typing_extensions", *sys.stdlib_module_names}


@dataclass(frozen=True, slots=True)
class Replacement:
    """A name of Megatron's that something stands in for."""

    target: str  # as ``module:function`` or ``module:Class.method``
    # As ``module:function``, whose first argument is the original; or one of :func:`maker`.
    by: str
    why: str  # a clause
    releases: tuple[str, ...] = SUPPORTED  # those in which it is replaced
    adds: bool = False  # whether these releases lack the name, and it is added
    # Whether it is also replaced where another module of Megatron's has somebody else's function
    # under that name, which calls the original.
    everywhere: bool = False

    @property
    def module(self) -> str:
        """Megatron's, that has the name."""
        return self.target.partition(":")[0]

    def concerns(self, version: str, *, training_loop: bool) -> bool:
        """Whether a Megatron is to have it; one of pip may lack the training loop."""
        here = any(version.startswith(f"{series}.") for series in self.releases)
        in_core = self.target.startswith("megatron.core")
        return here and (in_core or training_loop)


def table(room: str, rows: Mapping[str, Iterable[tuple[Any, ...]]]) -> tuple[Replacement, ...]:
    """Return the rows of a room.

    Args:
        room: in which the functions are that make what stands in; a full name is of another one.
        rows: by module of Megatron's, what :class:`Replacement` has: the name there, by, why, and
            perhaps releases, adds and everywhere.
    """
    return tuple(
        Replacement(
            f"{module}:{name}", by if by.startswith("megatron_came.") else f"{room}.{by}", *more
        )
        for module, names in rows.items()
        for name, by, *more in names
    )


def maker(function: Function) -> Function:
    """Mark what makes of an original what stands in for it; or returns it, if nothing is to do."""
    setattr(function, _MAKER, True)
    return function


def around(stand_in: Function, original: Function) -> Function:
    """Make what stands in for an original of a function whose first argument that is."""

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return stand_in(original, *args, **kwargs)

    return replaced


def put_in_place(rows: Iterable[Replacement]) -> None:
    """Replace what a table names, once: what the same row has replaced already is left alone.

    A name that somebody else has replaced is said; their function takes the original's place.

    Raises:
        MegatronError: Megatron is missing, of a release that is not supported, or lacks a name.
    """
    version, training_loop = check_version(), has_training_loop()
    if version.startswith(f"{IN_DEVELOPMENT}."):
        _say_once(
            f"Megatron {version} is a development version: CAME was tested with one of it, and "
            f"with the releases before {IN_DEVELOPMENT}."
        )
    for row in rows:
        if row.concerns(version, training_loop=training_loop):
            _replace(row, version)


def _replace(row: Replacement, version: str) -> None:
    owner, name, found = _find(row, version)
    # Such are unwrapped, and what stands in is wrapped as they were.
    original = found.__func__ if isinstance(found, classmethod | staticmethod) else found
    if row.by in getattr(original, _MARK, ()):
        return
    if found is not None:
        _say_if_replaced(original, row.target, version)
    stand_in = _made(row, original)
    if stand_in is original and not row.adds:
        return
    if found is not original:
        stand_in = type(found)(stand_in)
    setattr(owner, name, stand_in)
    if isinstance(owner, ModuleType) and found is not None:
        _replace_imported(row, version, original, stand_in)


def _made(row: Replacement, original: Any) -> Any:
    """Return what stands in for a function, marked."""
    by = pkgutil.resolve_name(row.by)
    stand_in = by(original) if hasattr(by, _MAKER) else around(by, original)
    if stand_in is not None and stand_in is not original:
        if "<locals>" in stand_in.__qualname__:  # others are found by their own name when pickled
            functools.wraps(original)(stand_in)
        setattr(stand_in, _MARK, (*getattr(original, _MARK, ()), row.by))
    return stand_in


def _replace_imported(
    row: Replacement, version: str, original: Function, stand_in: Function
) -> None:
    """Replace a function also where other modules have imported it."""
    for module in list(sys.modules.values()):  # copies: a lazy one may import more
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, key, stand_in)
            elif (
                row.everywhere
                and key == row.target.partition(":")[2]
                and module.__name__.startswith("megatron.")
                and row.by not in getattr(value, _MARK, ())
                and _say_if_replaced(value, f"{module.__name__}:{key}", version)
            ):
                setattr(module, key, _made(row, value))


def _say_once(sentence: str) -> None:
    from megatron_came.voice import say_once  # which needs PyTorch, as the tables do not

    say_once(sentence)


def _say_if_replaced(function: Any, target: str, version: str) -> bool:
    other = _somebody_else(function)
    if other:
        _say_once(
            f"{target} of Megatron {version} has been replaced already, by {other}: the two have "
            "not been tested together."
        )
    return other is not None


def _find(row: Replacement, version: str) -> tuple[Any, str, Any]:
    """Return the module or class that has a name, the last word of the name, and what it names.

    Raises:
        MegatronError: there is no such name.
    """
    module_name, _, path = row.target.partition(":")
    *classes, name = path.split(".")
    module = None
    try:
        module = importlib.import_module(module_name)
        owner = functools.reduce(getattr, classes, module)
        return owner, name, inspect.getattr_static(owner, name, *([None] if row.adds else []))
    except (ImportError, AttributeError) as error:
        where = getattr(module, "__file__", None) or f"its {module_name}"
        raise MegatronError(
            f"--optimizer came does not fit this Megatron, {version}: {where} has no {path}, which "
            f"is to be replaced: {row.why}."
        ) from error


def _somebody_else(function: Any) -> str | None:
    """Say who has replaced a function of Megatron's, by their module and its file."""
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if module.partition(".")[0] not in _KNOWN:
            file = getattr(sys.modules.get(module), "__file__", None)
            return f"{module} ({file})" if file else str(module)
        function = getattr(function, "__wrapped__", None)
    return None
