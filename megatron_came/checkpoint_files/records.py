"""What stands for objects of other packages: their names, arguments and attributes, and no code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Maker:
    """What stands for a class or a function that a pickle names.

    Args:
        make: makes what stands for an instance or a result.
    """

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class Record:
    """What stands for an object.

    Attributes:
        kind: full name of its class.
        arguments: what the class was called with.
        fields: its attributes, by name.
    """

    __slots__ = ("arguments", "fields", "kind")

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.arguments = arguments
        self.fields: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        """Take the state that the pickle gives: attributes, or what the class makes them of."""
        if isinstance(state, dict):
            self.fields.update((key, value) for key, value in state.items() if isinstance(key, str))
        else:
            self.fields["state"] = state

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.fields.get(name, default)

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class Dictionary(dict[Any, Any]):
    """What stands for ``OrderedDict`` and its like."""
