"""The load of a checkpoint under way."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Load:
    """What a checkpoint is being loaded into."""

    model_chunks: list[Any]
    optimizer: Any
    scheduler: Any
    folder: Any = None  # where Megatron found it
    differing: str = ""  # flags that it was saved with otherwise
    finished: bool = False  # the end that --exit-on-missing-checkpoint asks for


# The load under way, if it is to fill an optimizer: a checkpoint's weights alone suit anyone.
current: ContextVar[Load | None] = ContextVar("load", default=None)
